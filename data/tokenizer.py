"""Byte-level BPE: trained here on a dataset's own text, run by tiktoken. Or GPT-2's.

`tokenizer.json` in a dataset's folder says which: {"name": "gpt2"}, or a name with `tokens`, the vocabulary in the
order of its ranks, each token's bytes in base64. The last id of either is the end-of-text token.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import tiktoken

from common import UserError, write_atomically

END = "<|endoftext|>"
# GPT-2's way to cut text into pieces that merges never cross: contractions, words, numbers, signs, white space.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same for the standard library's `re`, which lacks \p: good enough to count pieces by when merges are learned.
PIECES = re.compile(r"""'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+""")


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016, on bytes as GPT-2): start from the 256 bytes and merge the most
    frequent adjacent pair, again and again. Returns at most vocab_size - 1 tokens in order of rank, leaving one id
    for the end of text."""
    counts = Counter(piece for text in texts for piece in PIECES.findall(text))
    words = {tuple(bytes([b]) for b in piece.encode("utf-8", "replace")): n for piece, n in counts.items()}
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size - 1:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # ties by the bytes, so that any machine agrees
        tokens.append(best[0] + best[1])
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
    def __init__(self, name, tokens=None):
        if tokens is None:
            self.encoding = tiktoken.get_encoding(name)
        else:
            self.encoding = tiktoken.Encoding(name, pat_str=PATTERN, special_tokens={END: len(tokens)},
                                              mergeable_ranks={token: i for i, token in enumerate(tokens)})
        self.name, self.tokens = name, tokens
        self.vocab_size = self.encoding.n_vocab
        self.end_of_text = self.encoding.eot_token
        # Tells two vocabularies of one size apart: a checkpoint keeps it (see common.load_model).
        self.fingerprint = name if tokens is None else hashlib.sha256(b"\n".join(tokens)).hexdigest()[:16]

    def encode(self, text):
        """text -> token ids. The text is ordinary text whatever it says: END inside it is thirteen characters."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Token ids -> text, without end-of-text tokens. Bytes that are no UTF-8 become U+FFFD."""
        return self.encoding.decode([i for i in ids if i != self.end_of_text])

    def save(self, folder):
        record = {"name": self.name}
        if self.tokens is not None:
            record["tokens"] = [base64.b64encode(token).decode() for token in self.tokens]
        write_atomically(Path(folder) / "tokenizer.json", lambda path: path.write_text(json.dumps(record)))

    @classmethod
    def load(cls, folder):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path} is missing; `make data` prepares the default dataset")
        try:
            record = json.loads(path.read_text())
            tokens = record.get("tokens")
            return cls(record["name"], tokens and [base64.b64decode(token, validate=True) for token in tokens])
        except Exception as error:
            raise UserError(f"{path}: no tokenizer ({type(error).__name__}: {error})") from None
