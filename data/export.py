"""A trained model as transformers reads it: config, weights and tokenizer in one folder.

    python data/export.py out/ppo FOLDER            # or a .pt file instead of the run's folder

A policy becomes a GPT2LMHeadModel, a reward model a GPT2ForSequenceClassification with one label (see common/gpt2.py).
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))

from common import gpt2
from common.checkpoints import is_checkpoint, load_checkpoint, load_model
from common.config import Parser, UserError, guard
from common.runtime import Runtime, RuntimeConfig
from data.tokenizer import Tokenizer
from model import GPT, ScalarModel


def export(run, folder, data=None):
    """Write the model of a run into `folder`; `data` is the dataset's folder, by default where the run found it."""
    path = Path(run) / "model.pt" if Path(run).is_dir() and not is_checkpoint(run) else Path(run)
    runtime = Runtime(RuntimeConfig(device="cpu"))
    checkpoint = load_checkpoint(path, "make", runtime)
    tokenizer = Tokenizer.load(data or checkpoint["data"])
    kind = ScalarModel if "head.weight" in checkpoint["model"] else GPT
    model = load_model(kind, path, "make", tokenizer, runtime)
    try:
        tokenizer.save_gpt2(folder, model.config.context, padding=kind is ScalarModel)
        write = gpt2.write_scalar_model if kind is ScalarModel else gpt2.write_policy
        write(folder, model)
    except ValueError as error:  # a vocabulary that is not made of merges, a head of zeros
        raise UserError(f"{path} can't be exported: {error}") from None
    auto = "AutoModelForSequenceClassification" if kind is ScalarModel else "AutoModelForCausalLM"
    print(f"{folder}: for transformers' {auto} and AutoTokenizer")


def main():
    parser = Parser(prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, or a .pt file")
    parser.add_argument("folder", help="where to write")
    parser.add_argument("--data", help="the dataset's folder, if it is no longer where the run found it")
    export(**vars(parser.parse_args()))


if __name__ == "__main__":
    guard(main)
