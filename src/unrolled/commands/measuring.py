"""The commands that measure: evaluate, bench; and kernels."""

from itertools import groupby
from typing import Annotated, Literal

from cyclopts import Parameter

import unrolled
from unrolled.answers import figure, notice, print_json, print_table
from unrolled.commands.kinds import Device, Json, Precision, RunFolder, Text, Whole


def evaluate(
    run: RunFolder,
    /,
    *,
    split: str = "test",
    data: Text | None = None,
    encoding: str | None = None,
    protocol: Literal["exact", "paper"] = "exact",
    device: Device = "auto",
    precision: Precision = "f32",
    json: Json = False,
) -> None:
    """Perplexity of a split, every token after the first counted once.

    Parameters
    ----------
    split
        train, valid or test.
    data
        Other text: a corpus, a folder or archive with splits, or one file, which is taken whole.
    encoding
        How the bytes of --data become characters.
    protocol
        exact: one stream, each token after the first counted once. paper: as the reference code did it, tail dropped.
    """
    answer = unrolled.load(run, device, precision).evaluate(split, protocol, data, encoding)
    if json:
        print_json(answer)
        return
    print_table(
        ["", ""],
        [
            ["text", f"{answer['corpus']}, {answer['split']}"],
            ["protocol", answer["protocol"]],
            ["tokens", f"{answer['tokens']:,}"],
            ["of them <unk>", f"{answer['unknown']:,} ({answer['unknown'] / answer['tokens']:.1%})"],
            ["perplexity", figure(answer["perplexity"], 3)],
            ["nats per token", f"{answer['nll_nats'] / answer['tokens']:.4f}"],
            ["bits per token", f"{answer['bits_per_token']:.4f}"],
            ["bits per character", figure(answer["bits_per_character"], 4)],
            *[
                [f"{name.replace('_', ' ')}, teacher-forced", figure(answer["teacher_forced"][name], 4)]
                for name in ("perplexity", "bits_per_character")
                if "teacher_forced" in answer
            ],
        ],
    )


def bench(
    *,
    recipe: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("ptb-small",),
    task: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("train", "score", "next-word"),
    subject: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    rounds: Whole = 5,
    seconds: float = 2.0,
    json: Json = False,
) -> None:
    """Speed beside PyTorch's own layers: the same recipe, text and machine, in alternating rounds.

    Shown are the median, least and most of the rounds; the ratio, how many times as fast as torch f32; the ceiling, the
    share of what PyTorch does on one large product; the most memory that was held. With --json the machine comes first.

    Parameters
    ----------
    recipe
        Recipes with a decoder of their own, by name or file.
    task
        train, score (64 streams), next-word (one stream).
    subject
        What to time beside the baseline, torch f32; all of ours and PyTorch's when none of them is named, those in bf16
        where the processor multiplies it. NAME=COMMAND is another program that trains, see benchmarks/peers.
    rounds
        How often each is timed.
    seconds
        How long one of them takes, about.
    """
    from unrolled import bench as benchmark

    untold = json
    for name in recipe:
        answers = benchmark.bench(name, task, subject, rounds, seconds, notice)
        for which, of_task in groupby(answers, key=lambda answer: answer["task"]):
            rows = []
            for answer in of_task:
                if untold:
                    print_json(benchmark.machine())
                    untold = False
                if json:
                    print_json(answer)
                    continue
                digits, share, memory = (
                    int(answer["unit"] == "µs"),
                    answer["share_of_ceiling"],
                    answer["peak_memory_mib"],
                )
                spread = [figure(answer[each], digits) for each in ("median", "minimum", "maximum")]
                rows.append([answer["subject"], *spread, figure(answer["ratio_to_baseline"], 2)])
                rows[-1] += ["" if share is None else f"{share:.0%}", "" if memory is None else f"{memory:,.0f}"]
            if rows:
                print(f"{name}, {which}, {benchmark.TASKS[which]}")
                print_table(["", "median", "least", "most", "ratio", "ceiling", "MiB"], rows)


def kernels_build(*, again: bool = False) -> None:
    """Compile the kernels for this processor, with its C++ compiler (CXX, or g++). They are kept in the cache.

    Parameters
    ----------
    again
        Compile them again although they are there.
    """
    from unrolled.kernels.build import build

    level, path = build(again, notice)
    print(f"{level}: {path}")


def kernels_status(*, json: Json = False) -> None:
    """Which kernels this processor can run, and whether they are built."""
    from unrolled.kernels.build import compiler, in_use, is_whole, levels, library_path

    used, level, command = in_use(), next(iter(levels()), None), compiler()
    path = library_path(level) if level else None
    answer = {
        "in_use": used,
        "level": level or "off",
        "built": path is not None and is_whole(path),
        "library": str(path) if path else None,
        "compiler": " ".join(command) if command else None,
    }
    if json:
        print_json(answer)
        return
    print_table(
        ["", ""],
        [
            ["in use", answer["in_use"]],
            ["best here, or chosen", answer["level"]],
            ["built", "yes" if answer["built"] else "no"],
            ["library", answer["library"] or "none"],
            ["compiler", answer["compiler"] or "none"],
        ],
    )
    if level and not answer["built"]:
        notice(f"not built for {level}: unrolled kernels build tries it")
    elif level and used != level:
        notice(f"that for {level} cannot be loaded, or the system does not grant the processor's matrix unit")
