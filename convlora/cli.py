"""The `convlora` program. Each verb is a thin layer over the Python function of the same name.

Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from convlora import cli_eg3d, cli_import
from convlora._version import __version__
from convlora.cli_adapters import Output, add_verbs
from convlora.errors import ConvloraError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status: 0, 1 for mistakes that `check` found, 2 for wrong input, 130 when
    interrupted.

    With `--json`, standard output is one JSON object, `{"error": "…"}` if it is 2; all else goes to standard error.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    as_json = "--json" in arguments
    try:
        options = _parser(_JsonParser if as_json else argparse.ArgumentParser).parse_args(arguments)
        # The user's own code may print while it makes the model.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            output: Output | None = options.run(options)
        if output is not None:
            print(json.dumps(output.data, ensure_ascii=False) if as_json else output.text)
            return output.status
    except (ConvloraError, OSError) as error:
        if as_json:
            print(json.dumps({"error": str(error)}, ensure_ascii=False))
        else:
            print(f"convlora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # These keep a run folder; the other verbs write their files at the end, or none.
        resumes = arguments[:1] == ["eg3d"] and arguments[1:2] and arguments[1] in cli_eg3d.RESUMING
        more = "the same command goes on from here" if resumes else "nothing was written"
        print(f"\nconvlora: interrupted; {more}", file=sys.stderr)
        return 130
    return 0


class _JsonParser(argparse.ArgumentParser):
    """Wrong usage is an error like others."""

    def error(self, message: str) -> NoReturn:
        raise ConvloraError(f"{message} ({self.format_usage().strip()})")


def _parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = kind(prog="convlora", description="Adapters for convolutional generators.")
    parser.add_argument("--version", action="version", version=f"convlora {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    add_verbs(verbs)
    cli_eg3d.add_verbs(verbs)
    cli_import.add_stylegan2(verbs)
    return parser
