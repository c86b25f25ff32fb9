"""The commands that look at what there is: inspect, embeddings, report, export, repair, recipes, data."""

import math
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

import unrolled
from unrolled.answers import notice, print_json, print_results, print_table, utf8
from unrolled.commands.kinds import Json, RunFolder, Text, Whole
from unrolled.errors import UnrolledError


def inspect(run: RunFolder, /, *, json: Json = False) -> None:
    """What a run folder holds: parameters by name and shape, vocabulary, provenance."""
    from unrolled.data.tokens import shown

    opened = unrolled.load(run, "cpu")
    parameters = {name: list(tensor.shape) for name, tensor in opened.model.named_parameters()}
    if json:
        recipe = opened.recipe.model_dump(mode="json")
        vocabulary = opened.tokenizer.vocabulary
        print_json(
            opened.manifest | {"run": str(run), "parameters": parameters, "vocabulary": vocabulary, "recipe": recipe}
        )
        return
    manifest = opened.manifest
    rows = [[name, " × ".join(map(str, shape)), f"{math.prod(shape):,}"] for name, shape in parameters.items()]
    print_table(["parameter", "shape", "count"], [*rows, ["all", "", f"{opened.model.num_parameters():,}"]])
    first = " ".join(shown(opened.tokenizer.token(id)) for id in range(min(12, len(opened.tokenizer))))
    corpus, training = manifest["corpus"], opened.recipe.training
    settings, epochs = opened.recipe.model.model_dump(), manifest.get("epochs", 0)
    print_table(
        ["", ""],
        [
            ["recipe", manifest["recipe"]],
            ["status", manifest["status"]],
            ["seed", str(manifest["seed"])],
            ["model", ", ".join(f"{key} {str(value).strip('(),')}" for key, value in settings.items() if value)],
            [
                "training",
                f"{training.optimizer}, {training.batch_size} streams, {training.num_steps} steps, "
                f"{training.precision}, kernels {manifest['versions'].get('kernels', 'none')}",
            ],
            ["tokens", opened.recipe.data.tokens],
            ["vocabulary", f"{len(opened.tokenizer):,}: {first} …"],
            ["corpus", corpus["name"] + (f" ({corpus['note']})" if corpus["note"] else "")],
            *[[f"  {s}", f"{i['tokens']:,} tokens, SHA-256 {i['sha256'][:16]}…"] for s, i in corpus["splits"].items()],
            ["started", manifest["started"]],
            ["trained", f"{epochs} epoch{'s' * (epochs != 1)}, {manifest.get('training_s', 0):,.0f} s"],
            ["machine", ", ".join(f"{key} {value}" for key, value in manifest.get("hardware", {}).items())],
            ["versions", ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())],
        ],
    )
    if "results" in manifest:
        print_results(opened)
    elif manifest["status"] == "done":
        notice(f"its results are not there; unrolled train --resume --out {run} makes them again")


def embeddings(
    run: RunFolder,
    /,
    *words: Text,
    k: Annotated[Whole, Parameter(name=["-k", "--k"])] = 10,
    map: Path | None = None,
    most: Whole = 300,
    seed: Whole = 0,
    json: Json = False,
) -> None:
    """What the model has learnt about its tokens: nearest neighbours by cosine, and a map.

    Parameters
    ----------
    words
        Tokens whose neighbours to list.
    k
        How many neighbours.
    map
        Draw the commonest tokens, like ones near each other (t-SNE), into this file: .png, .svg, .pdf, or .html to
        zoom in.
    most
        How many tokens the map shows.
    seed
        Another lays the map out otherwise.
    """
    if not words and map is None:
        raise UnrolledError("nothing to do; name words, or a file with --map")
    from unrolled.data.tokens import shown
    from unrolled.inference.embeddings import map_tokens, neighbours
    from unrolled.pictures import check_map_name, write_map

    if map is not None:
        check_map_name(map)
    if not 0 <= seed < 1 << 32:
        raise UnrolledError(f"--seed must be at least 0 and below 2 to the 32nd, not {seed}")
    opened = unrolled.load(run, "cpu")
    for word in (utf8(word) for word in words):
        found = neighbours(opened.model, opened.tokenizer, word, k)
        if json:
            print_json({"word": word, "neighbours": [{"word": other, "cosine": value} for other, value in found]})
            continue
        print(f"{shown(word)}", *(f"{value:9.3f}  {shown(other)}" for other, value in found), sep="\n")
    if map is not None:
        tokens, places = map_tokens(opened.model, opened.tokenizer, most, seed)
        unlabelled = write_map(tokens, places, map)
        notice(f"{map}: {len(tokens)} tokens" + f", {unlabelled} without room for a label" * bool(unlabelled))


_SHOWN = "Run folders: one, or several side by side."


def report(
    *runs: Annotated[Path, Parameter(help=_SHOWN, show_default=False)], out: Path | None = None, words: Whole = 300
) -> None:
    """One self-contained page about a run, or several side by side: curves, map, samples, recipe, provenance.

    Parameters
    ----------
    out
        The file; report.html in the run folder, or for several runs in this folder, when left out.
    words
        How many tokens the maps show; 0 for no maps.
    """
    from unrolled.report import write_report

    if not runs:
        raise UnrolledError("report takes a run folder, or several")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UnrolledError("report takes each run once")
    if words < 0:
        raise UnrolledError(f"--words must be 0 or more, not {words}")
    if out is not None and out.is_dir():
        raise UnrolledError(f"{out} is a folder; --out names the file")
    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_report([unrolled.load(run, "cpu") for run in runs], path, words)
    print(path)


def export(run: RunFolder, file: Path | None = None, /, *, int8: bool = False, json: Json = False) -> None:
    """The model as one ONNX file, tokenizer and all, for programs without PyTorch: in a browser, on a phone.

    Before it is written, what ONNX Runtime makes of it is compared with the model. docs/export.md shows its use.

    Parameters
    ----------
    file
        Where to, NAME.onnx; model.onnx, or model-int8.onnx, in the run folder when left out.
    int8
        A quarter of the size: weights rounded to 8 bits, row by row.
    """
    made = unrolled.load(run, "cpu").export(file, int8)
    if json:
        print_json(made)
        return
    flows = [("in", made["inputs"]), ("out", made["outputs"])]
    rows = [[way, name, " × ".join(map(str, shape))] for way, values in flows for name, shape in values.items()]
    print_table(["", "name", "shape"], rows)
    size, start = f"{made['bytes'] / 2**20:.1f} MiB", made["start_id"]
    print(f"{made['file']}: {size}, {made['weights']}; the token before a text is {start}")
    tokens = "random tokens" if made["checked_on"] == "random" else f"tokens of {made['checked_on']}"
    print(
        f"{made['checked_tokens']:,} {tokens}: perplexity {made['perplexity']:.3f}, in ONNX "
        f"Runtime {made['onnx_perplexity']:.3f}; with the same weights nothing is more than "
        f"{made['largest_difference']:.1g} apart"
    )


def repair(run: RunFolder, /, *, json: Json = False) -> int:
    """Check every file of a run folder, and mend what can be: from copies, from the resume point before.

    What is damaged is kept as NAME.damaged. Ends with status 1 where something is lost.
    """
    from unrolled.repair import as_dict
    from unrolled.repair import repair as mend

    findings = mend(run)
    if json:
        for finding in findings:
            print_json(as_dict(finding))
    else:
        print_table(["file", "", ""], [[finding.file, finding.state, finding.remark] for finding in findings])
    return int(any(finding.state == "lost" for finding in findings))


def recipes(name: str | None = None, /, *, json: Json = False) -> None:
    """The shipped recipes, or one of them whole.

    Parameters
    ----------
    name
        A recipe; all are listed when left out.
    """
    from unrolled.recipe import recipe_header, shipped_recipes

    if name is not None:
        recipe = unrolled.load_recipe(name)
        if json:
            print_json(recipe.model_dump(mode="json"))
        else:
            header = recipe_header(name) if name in shipped_recipes() else ""
            print("".join(f"# {line}\n" for line in header.splitlines()) + recipe.to_toml(), end="")
        return
    for shipped in shipped_recipes():
        if json:
            print_json({"name": shipped, "about": recipe_header(shipped)})
        else:
            lines = recipe_header(shipped).splitlines()
            print(f"{shipped:18}{lines[1]}", *(f"\n{'':18}{line}" for line in lines[2:]), sep="")


def data_list(*, json: Json = False) -> None:
    """The known corpora and whether they are on this machine."""
    from unrolled.data.text import KNOWN, find

    for name, known in KNOWN.items():
        place = "embedded" if not known.archive else str(find(name) or "not here; unrolled data fetch " + name)
        if json:
            print_json({"name": name, "about": known.title, "place": place})
        else:
            print(f"{name:8}{known.title}\n{'':8}{place}")


def data_fetch(name: str, /) -> None:
    """Download a known corpus into the cache and check it.

    Parameters
    ----------
    name
        ptb or text8.
    """
    from unrolled.data.text import fetch

    print(f"{name} is at {fetch(name)}")


def data_import(name: str, path: Path, /) -> None:
    """Take a known corpus from a local archive, folder or file into the cache, after checking it.

    Parameters
    ----------
    name
        ptb or text8.
    path
        Where it lies.
    """
    from unrolled.data.text import import_corpus

    corpus = import_corpus(name, path)
    sizes = ", ".join(f"{split} {part.stop - part.start:,} bytes" for split, part in corpus.splits.items())
    print(f"{name}: {sizes}" + (f" ({corpus.note})" if corpus.note else ""))


def data_show(
    name: Text,
    /,
    *,
    encoding: str = "utf-8",
    tokens: Literal["word", "character", "byte", "bpe"] = "word",
    json: Json = False,
) -> None:
    """A corpus by name or path: splits, counts, hashes, first line, with every word of train in the vocabulary.

    Parameters
    ----------
    name
        A known corpus, a text file, a folder or archive, or - for standard input.
    encoding
        How the bytes become characters.
    tokens
        The unit of text.
    """
    from unrolled.data.dataset import prepare
    from unrolled.data.text import open_corpus
    from unrolled.data.tokens import Vocabulary

    dataset = prepare(open_corpus(name, None if tokens == "byte" else encoding), Vocabulary(tokens))
    splits = {split: vars(info) for split, info in dataset.splits.items()}
    if json:
        print_json({"name": dataset.name, "note": dataset.note, "vocab_size": len(dataset.tokenizer), "splits": splits})
        return
    rows = [[s, f"{i['tokens']:,}", f"{i['unknown']:,}", i["sha256"]] for s, i in splits.items()]
    print_table([dataset.name, f"{tokens}s", "<unk>", "SHA-256"], rows)
    print(f"vocabulary {len(dataset.tokenizer):,}" + (f"; {dataset.note}" if dataset.note else ""))
    print("begins: " + (dataset.tokenizer.decode(dataset.ids["train"][:200])[:200].splitlines() or [""])[0])
