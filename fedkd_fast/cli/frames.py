"""The subcommands on files: compress, decompress, inspect."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from fedkd_fast.cli.common import (
    Parser,
    add_command,
    check_target,
    load_tensors,
    save_tensors,
    say,
    stdout,
    table,
    visible,
    write_bytes,
)
from fedkd_fast.report.text import size

# What the library's messages advise, and how it is done here.
_ADVICE = {
    "at most max_bytes": "at most --max-bytes",
    "pass base=": "give --base",
    "pass schema=": "decode it in Python, with schema=",
    "decode it without": "decode it without --base",
}


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the three subcommands."""
    parser = add_command(
        commands,
        "compress",
        _compress,
        "make a small frame from the tensors of a safetensors file",
        "update.safetensors update.fkd --energy 0.97\n"
        "update.safetensors update.fkd --budget-bytes 100000\n"
        "after.safetensors update.fkd --base before.safetensors",
        "Make a small frame from the tensors of a safetensors file. With --base the difference to "
        "it is encoded, and only the same base decodes the frame.",
    )
    parser.add_argument("source", type=Path, metavar="IN.safetensors", help="tensors to encode")
    parser.add_argument("target", type=Path, metavar="OUT.fkd", help="frame to write")
    parser.add_argument(
        "--base", type=Path, metavar="B.safetensors", help="encode the difference to these tensors"
    )
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument(
        "--energy",
        type=float,
        metavar="T",
        help="share of each tensor's squared norm to keep, in (0, 1]; larger means more bytes "
        "(0.95 where nothing is asked for)",
    )
    wish.add_argument(
        "--error", type=float, metavar="E", help="instead: largest relative error, in [0, 1)"
    )
    wish.add_argument(
        "--budget-bytes", type=int, metavar="N", help="instead: most bytes that the frame may take"
    )
    wish.add_argument(
        "--bits-per-param", type=float, metavar="B", help="instead: that in bits an element"
    )
    parser.add_argument(
        "--scope",
        default="tensor",
        metavar="NAME",
        help="keep the promise for each tensor, or for the message as a whole, which is smaller",
    )
    parser.add_argument(
        "--codec",
        default="wf1",
        metavar="NAME",
        help="wf1 (quantised, entropy-coded), dense (so, but without factors: faster, "
        "larger), wf0 (quantised only), factors-fp32 or raw (nothing lost)",
    )
    _add_overwrite(parser, "OUT.fkd")

    parser = add_command(
        commands,
        "decompress",
        _decompress,
        "turn a frame back into a safetensors file",
        "update.fkd update.safetensors\nupdate.fkd after.safetensors --base before.safetensors",
    )
    parser.add_argument("source", type=Path, metavar="IN.fkd", help="frame to decode")
    parser.add_argument("target", type=Path, metavar="OUT.safetensors", help="file to write")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="B.safetensors",
        help="the tensors that the frame is a difference to; the sum is written",
    )
    limit = parser.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        help="refuse a frame whose tensors take more than this; a small frame can claim any size",
    )
    parser.before_help = lambda: _add_default(limit)
    _add_overwrite(parser, "OUT.safetensors")

    parser = add_command(
        commands,
        "inspect",
        _inspect,
        "list what a frame holds and what each tensor costs",
        "update.fkd\nupdate.fkd --json",
    )
    parser.add_argument("source", type=Path, metavar="FILE.fkd", help="frame to list")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _add_overwrite(parser: Parser, target: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=f"replace {target} if it exists")


def _add_default(limit: argparse.Action) -> None:
    from fedkd_fast.wire import DEFAULT_MAX_BYTES

    limit.help = f"{limit.help} (default: {DEFAULT_MAX_BYTES})"


def _compress(args: argparse.Namespace) -> int:
    target = check_target(args.target, args.overwrite, args.source, args.base)
    from fedkd_fast.compress import Compressor

    compressor = Compressor(
        args.energy,
        args.codec,
        error=args.error,
        budget_bytes=args.budget_bytes,
        bits_per_param=args.bits_per_param,
        scope=args.scope,
        stateless=True,
    )
    tensors = load_tensors(args.source)
    base = None if args.base is None else load_tensors(args.base)
    frame = compressor.compress(tensors, base)
    write_bytes(target, frame)
    dense = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    share = f", {len(frame) / dense:.1%} of {size(dense)}" if dense else ""
    say(f"{args.target}: {size(len(frame))}{share}, {_count(len(tensors))}")
    return 0


def _decompress(args: argparse.Namespace) -> int:
    target = check_target(args.target, args.overwrite, args.source, args.base)
    from fedkd_fast.decompression import decompress
    from fedkd_fast.wire import DEFAULT_MAX_BYTES

    limit = DEFAULT_MAX_BYTES if args.max_bytes is None else args.max_bytes
    data = args.source.read_bytes()
    base = None if args.base is None else load_tensors(args.base)
    with _naming(args.source):
        tensors = decompress(data, base=base, max_bytes=limit)
    save_tensors(target, tensors)
    say(f"{args.target}: {size(target.stat().st_size)}, {_count(len(tensors))}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from fedkd_fast import wire
    from fedkd_fast.wire import Mode

    data = args.source.read_bytes()
    with _naming(args.source):
        entries = wire.inspect(data)
        head = wire.header(data)
    base = head.base or wire.Base()
    dense_bytes = sum(entry.dense_bytes for entry in entries)
    if args.json:
        tensors = [
            {
                **entry._asdict(),
                "mode": entry.mode.name,
                "rows_mode": entry.rows_mode.name if entry.rows_mode else None,
            }
            for entry in entries
        ]
        facts = {
            "file": str(args.source),
            "frame_bytes": len(data),
            "dense_bytes": dense_bytes,
            "codec": head.codec,
            "base_run": base.run,
            "base_round": base.round,
            "base_digest": base.digest.hex() if base.digest else None,
            "tensors": tensors,
        }
        say(json.dumps(facts, indent=2))
        return 0
    shown = table("tensor", "shape", "mode", "rank", "bytes", "share", "of dense", left=3)
    payload = 0
    for entry in entries:
        payload += entry.payload_bytes
        mode, number = entry.numbers
        how, rank = mode.name.lower().replace("_", " "), "–"
        if entry.mode is Mode.ROWS:
            how = f"{_count(entry.rank, 'row')}, {how}"
        if mode in wire.FACTORED:
            rank = str(number)
        elif mode is Mode.ALIAS:
            rank = f"= {visible(entries[number].name)}"
        shown.add_row(
            visible(entry.name),
            "×".join(map(str, entry.shape)) or "scalar",
            how,
            rank,
            f"{entry.payload_bytes:,}",
            f"{entry.payload_bytes / len(data):.1%}",
            f"{entry.payload_bytes / entry.dense_bytes:.1%}" if entry.dense_bytes else "–",
        )
    rest = len(data) - payload
    shown.add_row("header and directory", "", "", "", f"{rest:,}", f"{rest / len(data):.1%}", "")
    shown.add_section()
    share = f"{len(data) / dense_bytes:.1%}" if dense_bytes else "–"
    shown.add_row(f"total, {_count(len(entries))}", "", "", "", f"{len(data):,}", "100.0%", share)
    stdout().print(shown)
    if base.run is not None:
        say(f"difference to run {base.run}, round {base.round}")
    if base.digest is not None:
        say(f"difference to base {base.digest.hex()}")
    return 0


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with it, and say it in terms of options."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for advice, option in _ADVICE.items():
            message = message.replace(advice, option)
        raise ValueError(f"{path}: {message}") from error


def _count(count: int, what: str = "tensor") -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
