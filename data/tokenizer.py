"""Byte-level BPE: trained here on a dataset's own text, run by tiktoken. Or GPT-2's.

`tokenizer.json` in a dataset's folder holds a name and `tokens`, the vocabulary in the order of its ranks, each token's
bytes in base64; {"name": "gpt2"} alone stands for GPT-2's. The last id is the end-of-text token.
"""

import base64
import hashlib
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from common.config import UserError
from common.files import digest, write_atomically

END = "<|endoftext|>"
# GPT-2's way to cut text into pieces that merges never cross: contractions, words, numbers, signs, white space.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"  # where OpenAI keeps vocab.bpe and encoder.json
GPT2_SHA256 = ("1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
               "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
# PATTERN for the standard library's `re`, which lacks \p: good enough to count pieces by when merges are learned.
PIECES = re.compile(r"""'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+""")


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016, on bytes as GPT-2): start from the 256 bytes and merge the most
    frequent adjacent pair, again and again. Returns at most vocab_size - 1 tokens in order of rank, leaving one id
    for the end of text."""
    counts = Counter(piece for text in texts for piece in PIECES.findall(text))
    words = {tuple(bytes([b]) for b in piece.encode("utf-8", "replace")): n for piece, n in counts.items()}
    tokens = [bytes([i]) for i in range(256)]
    known = set(tokens)
    while len(tokens) < vocab_size - 1:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties by the bytes, so that any machine agrees
        if best[0] + best[1] not in known:  # two pairs can make one token
            tokens.append(best[0] + best[1])
            known.add(tokens[-1])
        words = {merge(word, best): n for word, n in words.items()}
    return tokens


def merge(word, pair):
    """merge((a, b, a, b, c), (a, b)) = (ab, ab, c)"""
    if pair[0] not in word:
        return word
    result, i = [], 0
    while i < len(word):
        if word[i:i + 2] == pair:
            result.append(pair[0] + pair[1])
            i += 2
        else:
            result.append(word[i])
            i += 1
    return tuple(result)


class Tokenizer:
    """`tokens`: the vocabulary, each token's bytes, in the order of ranks and ids. The end of text follows as the last."""

    def __init__(self, name, tokens):
        self.ranks = {token: i for i, token in enumerate(tokens)}
        if len(self.ranks) < len(tokens):
            raise ValueError("a token stands there twice")
        self.encoding = tiktoken.Encoding(name, pat_str=PATTERN, special_tokens={END: len(tokens)},
                                          mergeable_ranks=self.ranks)
        self.name, self.tokens = name, tokens
        self.vocab_size = self.encoding.n_vocab
        self.end_of_text = self.encoding.eot_token
        # Tells two vocabularies of one size apart: a checkpoint keeps it (see common.run.load_model).
        self.fingerprint = hashlib.sha256(b"\n".join(tokens)).hexdigest()[:16]

    @classmethod
    def gpt2(cls, folder=""):
        """GPT-2's, from vocab.bpe and encoder.json in `folder` or, without one, from tiktoken's cache or OpenAI's server."""
        source = folder or GPT2
        for name, sha256 in zip(("vocab.bpe", "encoder.json"), GPT2_SHA256 if folder else ()):
            path = Path(folder) / name
            if not path.is_file():
                raise UserError(f"{path} is missing; it is at {GPT2}/{name}")
            if digest(path) != sha256:
                raise UserError(f"{path} is damaged or not GPT-2's: its checksum differs; it is at {GPT2}/{name}")
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(f"{source}/vocab.bpe", f"{source}/encoder.json", *GPT2_SHA256)
        except (ValueError, KeyError, AssertionError):
            raise UserError(f"{source}: vocab.bpe or encoder.json came damaged; try again") from None
        except OSError as error:  # requests' errors are among them
            raise UserError(f"GPT-2's vocabulary can't be downloaded ({type(error).__name__}): put vocab.bpe and encoder.json "
                            f"from {GPT2} into a folder and say --bpe FOLDER when preparing the data") from None
        return cls("gpt2", sorted(ranks, key=ranks.get))

    def encode(self, text):
        """text -> token ids. The text is ordinary text whatever it says: END inside it is thirteen characters."""
        return [i for part in without_deserts(text) for i in self.encoding.encode_ordinary(part)]

    def encode_batch(self, texts):
        """The same for many texts at once, on all cores."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self.encode, texts))

    def decode(self, ids):
        """Token ids -> text, without end-of-text tokens. Bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode([i for i in ids if i != self.end_of_text])

    def merges(self):
        """The pair of tokens that each token of two bytes or more was merged from, in the order of ranks: what its own
        bytes come to when only merges of lower rank are allowed."""
        result = []
        for token in self.tokens:
            parts = [token[i:i + 1] for i in range(len(token))]
            while len(parts) > 2:
                pairs = [(self.ranks.get(a + b, len(self.ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
                rank, i = min(pairs)
                if rank >= self.ranks[token]:
                    raise ValueError(f"{token!r} is not made of two tokens of lower rank")
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                result.append(tuple(parts))
        return result

    def save(self, folder):
        record = {"name": self.name, "tokens": [base64.b64encode(token).decode() for token in self.tokens]}
        write_atomically(Path(folder) / "tokenizer.json", lambda path: path.write_text(json.dumps(record)))

    def save_gpt2(self, folder, context, padding=False):
        """Write vocab.json, merges.txt and tokenizer_config.json, as transformers' AutoTokenizer reads them; with
        `padding`, a token for it behind the end of text."""
        characters = printable_bytes()

        def show(token):
            return "".join(characters[b] for b in token)

        vocabulary = {show(token): i for i, token in enumerate(self.tokens)} | {END: self.end_of_text}
        config = dict(tokenizer_class="GPT2Tokenizer", model_max_length=context, add_prefix_space=False,
                      clean_up_tokenization_spaces=False, bos_token=END, eos_token=END, unk_token=END)
        files = {"vocab.json": json.dumps(vocabulary, ensure_ascii=False),
                 "merges.txt": "#version: 0.2\n" + "".join(f"{show(a)} {show(b)}\n" for a, b in self.merges()),
                 "tokenizer_config.json": json.dumps(config | ({"pad_token": "<|pad|>"} if padding else {}), indent=2)}
        for name, text in files.items():
            write_atomically(Path(folder) / name, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path} is missing; a prepare.py makes it, `make data` that of the default dataset")
        try:
            record = json.loads(path.read_text())
            if record == {"name": "gpt2"}:
                return cls.gpt2()
            return cls(record["name"], [base64.b64decode(token, validate=True) for token in record["tokens"]])
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path}: no tokenizer ({type(error).__name__}: {error})") from None


def without_deserts(text):
    """The text in parts, cut in white space after every 5,000 characters of it: a million would overflow tiktoken's stack."""
    cuts = [0, *(match.end() for match in re.finditer(r"\s{5000}", text)), len(text)] if len(text) > 5000 else [0, len(text)]
    return [text[a:b] for a, b in zip(cuts, cuts[1:])]


def printable_bytes():
    """The character by which GPT-2's files show each byte: itself where it can be seen, else one from 256 on."""
    seen = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    unseen = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(unseen)}
