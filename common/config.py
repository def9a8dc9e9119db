"""The command line of every script, and how errors and Ctrl-C end it."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import get_type_hints


class UserError(Exception):
    """An error that the user can fix: printed on one line, exit status 2."""


class Disagreement(UserError):
    """The processes of a run differ: all of them raise this."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors raised as UserError and `# comments` allowed in @files."""

    def error(self, message):
        raise UserError(message)

    def convert_arg_line_to_args(self, line):  # a line of an @file: `--name value  # comment`
        return line.split("#")[0].split()


def number(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def parse_config(Config, argv=None):
    """Make a command line from a frozen dataclass of hyperparameters and parse it: `--name value`, `--flag` and
    `--no-flag`, `@file` to read arguments from a file; `--help` shows the comment and default of each field.
    Raises UserError for an unknown name, a wrong type, or what Config's __post_init__ refuses by ValueError."""
    source = "".join(inspect.getsource(kind) for kind in reversed(Config.__mro__[:-1]))  # what Config inherits comes first
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    types = get_type_hints(Config)
    doc = inspect.getdoc(inspect.getmodule(Config)) or ""
    parser = Parser(description=doc, fromfile_prefix_chars="@", allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        help = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        if types[field.name] is bool:
            parser.add_argument(f"--{field.name}", default=field.default, action=argparse.BooleanOptionalAction,
                                help=help)
        else:
            kind = types[field.name]
            parser.add_argument(f"--{field.name}", default=field.default, type=number if kind is float else kind,
                                help=help, metavar=kind.__name__)
    try:
        return Config(**vars(parser.parse_args(argv)))
    except ValueError as error:
        raise UserError(str(error)) from None


def check(condition, message):
    """ValueError with the message unless the condition holds: for __post_init__ of a Config."""
    if not condition:
        raise ValueError(message)


def check_range(config, *names, low, high=None):
    """ValueError for the first of these settings that is below `low` or above `high`."""
    for name in names:
        limit = "" if high is None else f" and at most {high:g}"
        value = getattr(config, name)
        check(low <= value and (high is None or value <= high), f"--{name} is at least {low}{limit}")


def launch(main, Config):
    """What every script does when run: parse the command line, call main(config); errors in one line."""
    guard(lambda: main(parse_config(Config)))


def guard(work):
    """Call work(); a UserError is printed on one line, with exit status 2."""
    name = Path(sys.argv[0]).name
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, Interrupt.take)
    try:
        work()
    except (UserError, OSError) as error:  # OSError: a full disk, a folder without write permission
        if not isinstance(error, Disagreement):
            Others.tell({"error": str(error)})
        print(f"{name}: {error}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped; a run resumes from its last checkpoint, if any, by the same command",
              file=sys.stderr)
        leave(130)
    except Exception:
        if error := Others.error():  # this one is a lost connection only
            print(f"{name}: {error}", file=sys.stderr)
            leave(2)
        traceback.print_exc()
        leave(1)


def leave(status):
    """Exit. One of several processes exits at once, without atexit handlers: destroying the process group would wait for the
    others, which may be waiting for this one. torchrun stops them."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class Others:
    """The processes of this run, and what each of them told last through torchrun's store: {name: value}, or the error that
    ends it. The store works before the process group does, and after a process left it."""

    store, rank, world_size = None, 0, 1  # set by processes.join

    @classmethod
    def tell(cls, facts):
        if cls.store:
            with contextlib.suppress(RuntimeError):  # torchrun has ended
                cls.store.set(f"rank {cls.rank}", json.dumps([f"{platform.node()} (rank {cls.rank})", facts]))
                cls.store.get(f"rank {cls.rank}")  # waits until it has arrived

    @classmethod
    def hear(cls):
        """[(machine and rank, what it told)] of all ranks. Waits for those that told nothing yet."""
        keys = [f"rank {rank}" for rank in range(cls.world_size)]
        try:
            return [json.loads(text) for text in cls.store.multi_get(keys)]
        except RuntimeError:
            missing = [key for key in keys if not cls.store.check([key])]
            raise UserError(f"{', '.join(missing)} did not start within ten minutes: see the messages there") from None

    @classmethod
    def error(cls):
        """The error that ended another process, and where; None if there is none."""
        with contextlib.suppress(RuntimeError, AttributeError, UserError):
            return next((f"{machine}: {facts['error']}" for machine, facts in cls.hear() if "error" in facts), None)


class Interrupt:
    """Ctrl-C or SIGTERM. During a Run the current step is finished and saved first (Run.checkpoint). A second Ctrl-C, or any
    signal at another time, stops at once. A second SIGTERM does not: Slurm and torchrun each send one."""

    waiting = asked = False  # a Run is in progress; a signal came

    @classmethod
    def take(cls, number, frame):
        if not cls.waiting or cls.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        cls.asked = True
