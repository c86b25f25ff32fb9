"""The commands: parse, call one function, print. Answers go to standard output, progress and notices to standard error.

Nothing heavier than the command line's own library is imported until a command runs.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin

from cyclopts import App, CycloptsError, Group, Parameter, Token, UnusedCliTokensError

import unrolled
from unrolled.errors import UnrolledError
from unrolled.recipe import FIELDS, SECTIONS, load_recipe

if TYPE_CHECKING:
    from unrolled.run import Run

NO_NEGATIVES = Parameter(negative=())
app = App(
    name="unrolled",
    help="Recurrent language models that anyone can train, trust and use on an ordinary computer.",
    version=unrolled.__version__,
    default_parameter=NO_NEGATIVES,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
data_app = App(
    name="data", help="The corpora: what there is, where it is, how to get it.", default_parameter=NO_NEGATIVES
)
app.command(data_app)


SHORT_FORMS = {
    "data.encoding": ["--encoding"],
    "training.max_epochs": ["--max-epochs"],
    "training.seed": ["--seed"],
    "training.device": ["--device"],
    "training.precision": ["--precision"],
    "training.sample_every": ["--sample-every"],
}


def _recipe_options() -> type:
    """One option for every field of a recipe, `--training.num-steps` and the like, with the field's own help."""
    groups = {
        name: Group(f"{name.capitalize()}: {(section.__doc__ or '').strip()}", sort_key=number)
        for number, (name, section) in enumerate(SECTIONS.items(), start=1)
    }
    options, demo = [], load_recipe("demo")
    for dotted in FIELDS:
        section, _, name = dotted.partition(".")
        about = SECTIONS[section].model_fields[name]
        choices = get_args(about.annotation) if get_origin(about.annotation) is Literal else ()
        default = getattr(getattr(demo, section), name)
        default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
        parameter = Parameter(
            name=["--" + dotted.replace("_", "-"), *SHORT_FORMS.get(dotted, [])],
            help=f"{about.description} [{', '.join(choices) + '; ' * bool(choices)}demo: {default}]",
            group=groups[section],
        )
        options.append((dotted.replace(".", "__"), Annotated[str | None, parameter], field(default=None)))
    made = make_dataclass("RecipeOptions", options)
    made.__module__ = __name__
    return made


if TYPE_CHECKING:

    class RecipeOptions: ...
else:
    RecipeOptions = _recipe_options()

Text = Annotated[str, Parameter(allow_leading_hyphen=True)]  # "-" is standard input
RunFolder = Annotated[Path, Parameter(help="A run folder.", show_default=False)]
Json = Annotated[bool, Parameter(help="Answer in JSON, one object a line.")]


def _whole(kind: object, tokens: Sequence[Token]) -> int:
    """A whole number as it is written; `int` of the command line's library would take 1.5 for 1."""
    return int(tokens[0].value)


Whole = Annotated[int, Parameter(converter=_whole)]
Device = Annotated[str, Parameter(help="cpu, cuda, cuda:1; auto takes a GPU where there is one.")]


@app.command
def train(
    recipe: str | None = None,
    /,
    *,
    data: Text | None = None,
    out: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    json: Json = False,
    options: Annotated[RecipeOptions, Parameter(name="*")] = RecipeOptions(),  # noqa: B008
) -> int:
    """Train a model and leave a run folder.

    What an option does not say, the recipe says; the values in brackets are those of the recipe demo.

    Parameters
    ----------
    recipe
        A shipped recipe (unrolled recipes lists them) or a TOML file; demo when left out.
    data
        A corpus by name, a text file, a folder or archive with train, valid and test, or - for standard input.
    out
        The run folder; runs/RECIPE-N when left out.
    resume
        Go on with the run folder of --out, or with the newest of this recipe.
    quiet
        No progress.
    """
    from unrolled.progress import Display

    changes = {name.replace("__", "."): value for name, value in vars(options).items()}
    changes = {name: value for name, value in changes.items() if value is not None}
    with Display(quiet=quiet, on_epoch=_print_epoch if json else None) as display:
        run = unrolled.train(recipe, data=data, out=out, resume=resume, changes=changes, progress=display)
    if run.manifest["status"] == "stopped":
        _notice(f"stopped after step {run.manifest['steps']:,}; go on with: unrolled train --resume --out {run.path}")
        return 130
    if json:
        _print_json({"run": str(run.path), **run.manifest["results"]})
    else:
        _print_results(run)
    return 0


@app.command
def evaluate(
    run: RunFolder,
    /,
    *,
    split: str = "test",
    data: Text | None = None,
    encoding: str | None = None,
    protocol: Literal["exact", "paper"] = "exact",
    device: Device = "auto",
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
    answer = _load(run, device).evaluate(split, protocol, data, encoding)
    if json:
        _print_json(answer)
        return
    _print_table(
        ["", ""],
        [
            ["text", f"{answer['corpus']}, {answer['split']}"],
            ["protocol", answer["protocol"]],
            ["tokens", f"{answer['tokens']:,}"],
            ["of them <unk>", f"{answer['unknown']:,} ({answer['unknown'] / answer['tokens']:.1%})"],
            ["perplexity", _number(answer["perplexity"], 3)],
            ["nats per token", f"{answer['nll_nats'] / answer['tokens']:.4f}"],
            ["bits per token", f"{answer['bits_per_token']:.4f}"],
            ["bits per character", _number(answer["bits_per_character"], 4)],
            *[
                [f"{name.replace('_', ' ')}, teacher-forced", _number(answer["teacher_forced"][name], 4)]
                for name in ("perplexity", "bits_per_character")
                if "teacher_forced" in answer
            ],
        ],
    )


@app.command
def score(
    run: RunFolder,
    file: Annotated[Text, Parameter(help="A text file, or - for standard input.")] = "-",
    /,
    *,
    per_token: bool = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """How probable each line of a text is: log-probability in nats, tokens, unknown words, perplexity.

    Every line is scored afresh, from the beginning to the end of a line.

    Parameters
    ----------
    per_token
        Show every token with its log-probability, too.
    """
    model = _load(run, device)
    for number, line in enumerate(_lines(file), start=1):
        result = model.score(line)
        answer: dict[str, Any] = {
            "id": number,
            "log_prob": result.log_prob,
            "tokens": result.tokens,
            "unknown": result.unknown,
            "perplexity": result.perplexity,
        }
        if json:
            if per_token:
                answer["per_token"] = [{"token": token, "log_prob": value} for token, value in result.per_token]
            _print_json(answer)
            continue
        if number == 1:
            print(f"{'log_prob':>12} {'tokens':>6} {'<unk>':>6} {'perplexity':>12}  text")
        worth = "" if result.perplexity is None else f"{result.perplexity:12.2f}"
        print(f"{result.log_prob:12.4f} {result.tokens:6d} {result.unknown:6d} {worth:>12}  {line}", flush=True)
        if per_token:
            for token, value in result.per_token:
                print(f"{value:12.4f}   {_shown(token)}")


@app.command
def predict(
    run: RunFolder,
    prefix: Annotated[str | None, Parameter(help="A text; standard input, line by line, when left out.")] = None,
    /,
    *,
    k: Annotated[Whole, Parameter(name=["-k", "--k"])] = 10,
    unknown: bool = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """The likeliest next words after a text, with their probabilities.

    Parameters
    ----------
    k
        How many.
    unknown
        Let <unk> be among them.
    """
    model = _load(run, device)
    for text in _lines("-") if prefix is None else [_utf8(prefix)]:
        found = model.predict(text, k, unknown)
        if json:
            words = [{"word": word, "probability": value} for word, value in found.words]
            _print_json({"prefix": found.prefix, "words": words})
            continue
        if prefix is None:
            print(f"{text} …")
        for word, value in found.words:
            print(f"{value:9.3%}  {_shown(word)}")


@app.command
def generate(
    run: RunFolder,
    /,
    *,
    prompt: Text | None = None,
    prompt_file: Path | None = None,
    length: Whole = 100,
    temperature: float = 1.0,
    top_k: Whole = 0,
    top_p: float = 1.0,
    seed: Whole | None = None,
    unknown: bool = False,
    random_start: bool = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write more: a text continued, streamed as it is drawn.

    Parameters
    ----------
    prompt
        The beginning of the text; - reads it from standard input; a new line when left out.
    prompt_file
        A file that holds the beginning.
    length
        Tokens to draw.
    temperature
        Below 1 is safer, above 1 bolder; 0 takes the likeliest every time.
    top_k
        Draw among the k likeliest only; 0 for all.
    top_p
        Draw among the likeliest that make up this share of the probability; 1 for all.
    seed
        The same seed writes the same text.
    unknown
        Let <unk> be drawn.
    random_start
        Begin with a token drawn from all alike, instead of at the beginning of a line.
    """
    if prompt is not None and prompt_file is not None:
        raise UnrolledError("--prompt and --prompt-file exclude each other")
    if prompt_file is not None or prompt == "-":
        prompt = "\n".join(_lines(str(prompt_file or "-")))
    prompt = _utf8(prompt or "")
    model = _load(run, device)
    from unrolled.inference.generate import new_seed

    seed = new_seed() if seed is None else seed
    pieces = model.stream(
        prompt,
        length=length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        unknown=unknown,
        random_start=random_start,
    )
    if json:
        _print_json({"prompt": prompt, "text": "".join(pieces), "tokens": length, "seed": seed})
        return
    piece = prompt
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print("" if piece.endswith("\n") else "\n", end="")


@app.command
def inspect(run: RunFolder, /, *, json: Json = False) -> None:
    """What a run folder holds: parameters by name and shape, vocabulary, provenance."""
    opened = _load(run, "cpu")
    parameters = {name: list(tensor.shape) for name, tensor in opened.model.named_parameters()}
    if json:
        recipe = opened.recipe.model_dump(mode="json")
        vocabulary = opened.tokenizer.vocabulary
        _print_json(
            {"run": str(run), "parameters": parameters, "vocabulary": vocabulary, "recipe": recipe} | opened.manifest
        )
        return
    manifest = opened.manifest
    rows = [[name, " × ".join(map(str, shape)), f"{math.prod(shape):,}"] for name, shape in parameters.items()]
    _print_table(["parameter", "shape", "count"], [*rows, ["all", "", f"{opened.model.num_parameters():,}"]])
    first = " ".join(_shown(opened.tokenizer.token(id)) for id in range(min(12, len(opened.tokenizer))))
    corpus = manifest["corpus"]
    _print_table(
        ["", ""],
        [
            ["recipe", manifest["recipe"]],
            ["status", manifest["status"]],
            ["seed", str(manifest["seed"])],
            ["tokens", opened.recipe.data.tokens],
            ["vocabulary", f"{len(opened.tokenizer):,}: {first} …"],
            ["corpus", corpus["name"] + (f" ({corpus['note']})" if corpus["note"] else "")],
            *[[f"  {s}", f"{i['tokens']:,} tokens, SHA-256 {i['sha256'][:16]}…"] for s, i in corpus["splits"].items()],
            ["started", manifest["started"]],
            ["trained", f"{manifest.get('epochs', 0)} epochs, {manifest.get('training_s', 0):,.0f} s"],
            ["machine", ", ".join(f"{key} {value}" for key, value in manifest.get("hardware", {}).items())],
            ["versions", ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())],
        ],
    )
    if manifest["status"] == "done":
        _print_results(opened)


@app.command
def embeddings(
    run: RunFolder,
    /,
    *words: Text,
    k: Annotated[int, Parameter(name=["-k", "--k"])] = 10,
    map: Path | None = None,
    most: int = 300,
    seed: int = 0,
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
        Of the map's layout.
    """
    from unrolled.inference.embeddings import map_tokens, neighbours

    if not words and map is None:
        raise UnrolledError("nothing to do; name words, or a file with --map")
    opened = _load(run, "cpu")
    for word in (_utf8(word) for word in words):
        found = neighbours(opened.model, opened.tokenizer, word, k)
        if json:
            _print_json({"word": word, "neighbours": [{"word": other, "cosine": value} for other, value in found]})
            continue
        print(f"{_shown(word)}", *(f"{value:9.3f}  {_shown(other)}" for other, value in found), sep="\n")
    if map is not None:
        from unrolled.report import write_map

        tokens, places = map_tokens(opened.model, opened.tokenizer, most, seed)
        unlabelled = write_map(tokens, places, map)
        _notice(f"{map}: {len(tokens)} tokens" + f", {unlabelled} without room for a label" * bool(unlabelled))


@app.command
def report(*runs: RunFolder, out: Path | None = None, words: int = 300) -> None:
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
    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_report([_load(run, "cpu") for run in runs], path, words)
    print(path)


@app.command
def recipes(name: str | None = None, /, *, json: Json = False) -> None:
    """The shipped recipes, or one of them whole.

    Parameters
    ----------
    name
        A recipe; all are listed when left out.
    """
    from unrolled.recipe import recipe_header, shipped_recipes

    if name is not None:
        recipe = load_recipe(name)
        if json:
            _print_json(recipe.model_dump(mode="json"))
        else:
            header = recipe_header(name) if name in shipped_recipes() else ""
            print("".join(f"# {line}\n" for line in header.splitlines()) + recipe.to_toml(), end="")
        return
    for shipped in shipped_recipes():
        if json:
            _print_json({"name": shipped, "about": recipe_header(shipped)})
        else:
            lines = recipe_header(shipped).splitlines()
            print(f"{shipped:16}{lines[1]}", *(f"\n{'':16}{line}" for line in lines[2:]), sep="")


@data_app.command(name="list")
def data_list(*, json: Json = False) -> None:
    """The known corpora and whether they are on this machine."""
    from unrolled.data.text import KNOWN, find

    for name, known in KNOWN.items():
        place = "embedded" if not known.archive else str(find(name) or "not here; unrolled data fetch " + name)
        if json:
            _print_json({"name": name, "about": known.title, "place": place})
        else:
            print(f"{name:8}{known.title}\n{'':8}{place}")


@data_app.command(name="fetch")
def data_fetch(name: str, /) -> None:
    """Download a known corpus into the cache and check it.

    Parameters
    ----------
    name
        ptb or text8.
    """
    from unrolled.data.text import fetch

    print(f"{name} is at {fetch(name)}")


@data_app.command(name="import")
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


@data_app.command(name="show")
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
        _print_json(
            {"name": dataset.name, "note": dataset.note, "vocab_size": len(dataset.tokenizer), "splits": splits}
        )
        return
    rows = [[s, f"{i['tokens']:,}", f"{i['unknown']:,}", i["sha256"]] for s, i in splits.items()]
    _print_table([dataset.name, f"{tokens}s", "<unk>", "SHA-256"], rows)
    print(f"vocabulary {len(dataset.tokenizer):,}" + (f"; {dataset.note}" if dataset.note else ""))
    print("begins: " + (dataset.tokenizer.decode(dataset.ids["train"][:200])[:200].splitlines() or [""])[0])


# ------------------------------------------------------------------------------------------------ printing


def _load(path: Path, device: str) -> "Run":
    return unrolled.load(path, device)


def _lines(file: str) -> Iterator[str]:
    """The lines of a UTF-8 file or of standard input, as they come."""
    if file == "-" and sys.stdin is None:
        raise UnrolledError("standard input is closed")
    with sys.stdin.buffer if file == "-" else open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                place = "standard input" if file == "-" else file
                here = f"{place}, line {number}, byte {error.start + 1}"
                raise UnrolledError(f"{here}: not UTF-8; convert it first (iconv -f latin1 -t utf-8)") from error


def _utf8(text: str) -> str:
    """An argument as it is, refused where the shell gave bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnrolledError(f"{text!r} is not UTF-8") from error
    return text


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _print_epoch(event: dict[str, Any]) -> None:
    names = ("epoch", "train_perplexity", "valid_perplexity", "valid_protocol", "learning_rate")
    _print_json({name: event[name] for name in (*names, "tokens_per_second", "elapsed_s")})


def _print_results(run: "Run") -> None:
    results = run.manifest["results"]
    rows = []
    for split in ("valid", "test"):
        result = results[split]
        figures = _number(result["perplexity"], 2), _number(result["bits_per_character"], 3)
        rows.append([split, result["protocol"], f"{result['tokens']:,}", *figures])
        if "teacher_forced" in result:
            forced = result["teacher_forced"]
            figures = _number(forced["perplexity"], 2), _number(forced["bits_per_character"], 3)
            rows[-1][1] += ", own output"
            rows.append([split, result["protocol"] + ", teacher-forced", f"{result['tokens']:,}", *figures])
    if results["valid_protocol"] == "paper":
        named = "paper" + ", teacher-forced" * ("teacher_forced" in results["valid"])
        rows.insert(0, ["valid", named, "", _number(results["valid_perplexity"], 2), ""])
    yardsticks = [name for name in ("trigram", "bigram", "unigram", "uniform") if f"{name}_test_perplexity" in results]
    rows += [["test", name, "", _number(results[f"{name}_test_perplexity"], 2), ""] for name in yardsticks]
    _print_table(["split", "protocol", "tokens", "perplexity", "bits per character"], rows)
    train_perplexity = _number(results["train_perplexity"], 2)
    print(
        f"best epoch {results['best_epoch']}, its train perplexity as it ran {train_perplexity}; run folder {run.path}"
    )


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Cell

    table = Table(box=box.SIMPLE_HEAD if any(header) else None, show_header=any(header), pad_edge=False)
    for name in header:
        table.add_column(Cell(name))
    for row in rows:
        table.add_row(*map(Cell, row))
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 200
    console.print(table)


def _print_json(answer: dict[str, Any]) -> None:
    from unrolled.folder import finite

    print(json.dumps(finite(answer), ensure_ascii=False, allow_nan=False), flush=True)


def _shown(token: str) -> str:
    """A token as one visible piece of a line."""
    return json.dumps(token, ensure_ascii=False) if token.strip() != token or not token.isprintable() else token


def _notice(text: str) -> None:
    print(f"unrolled: {text}", file=sys.stderr)


def _fail(text: str, status: int = 2) -> NoReturn:
    _notice(" ".join(text.split()))
    sys.exit(status)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The command `unrolled`. A user's mistake is one line on standard error and exit status 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except UnusedCliTokensError as error:
        _fail("too many arguments: " + " ".join(error.unused_tokens or []))
    except CycloptsError as error:
        _fail(str(error))
    except UnrolledError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:  # a fault of ours: one line all the same
        if os.environ.get("UNROLLED_TRACEBACK"):
            raise
        _fail(f"internal error, please report it: {error!r} (UNROLLED_TRACEBACK=1 shows where)", 1)
    sys.exit(status or 0)
