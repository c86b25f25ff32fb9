"""The commands: parse, call one function, print. Answers go to standard output, progress and notices to standard error.

Nothing heavier than the command line's own library is imported until a command runs.
"""

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

import unrolled
from unrolled.answers import (
    ScorePrinter,
    fail,
    figure,
    notice,
    notice_unknown,
    print_epoch,
    print_json,
    print_results,
    print_table,
    read_lines,
    utf8,
    visible,
)
from unrolled.errors import UnrolledError
from unrolled.options import Device, Json, Precision, RecipeOptions, RunFolder, Text, Whole
from unrolled.recipe import load_recipe

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
kernels_app = App(
    name="kernels", help="The native kernels: several times faster, compiled once.", default_parameter=NO_NEGATIVES
)
app.command(kernels_app)


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
    with Display(quiet=quiet, on_epoch=print_epoch if json else None) as display:
        run = unrolled.train(recipe, data=data, out=out, resume=resume, changes=changes, progress=display)
    if run.manifest["status"] == "stopped":
        notice(f"stopped after step {run.manifest['steps']:,}; go on with: unrolled train --resume --out {run.path}")
        return 130
    if json:
        print_json({"run": str(run.path), **run.manifest["results"]})
    else:
        print_results(run)
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


@app.command
def score(
    run: RunFolder,
    file: Annotated[Text, Parameter(help="A text file, or - for standard input.")] = "-",
    /,
    *,
    per_token: bool = False,
    from_json: bool = False,
    text_field: str = "text",
    id_field: str = "id",
    score_field: str = "score",
    base: Literal["e", "2", "10"] = "e",
    begin: Annotated[bool, Parameter(negative="--no-begin")] = True,
    end: Annotated[bool, Parameter(negative="--no-end")] = True,
    carry: bool = False,
    unknown: Literal["count", "skip", "spell"] = "count",
    most_tokens: Whole = 1_000_000,
    nbest: Literal["best", "all"] | None = None,
    weight: float = 1.0,
    other_weight: float = 1.0,
    token_bonus: float = 0.0,
    anomalies: Whole = 0,
    device: Device = "auto",
    precision: Precision = "f32",
    json: Json = False,
) -> None:
    """How probable each line of a text is: log-probability, tokens, unknown words, perplexity.

    Lines are answered as they come, so a stream without end can be scored. A line that cannot be scored is said in its
    place (with --nbest and --anomalies on standard error), and the rest go on; the exit status is 0 all the same.

    Parameters
    ----------
    per_token
        Show every token with its log-probability and its surprisal in bits.
    from_json
        Lines are objects in JSON with a text, and perhaps an id, which comes back.
    text_field, id_field, score_field
        What these are called there.
    base
        Of the logarithms.
    begin
        The first token follows the end of a line; --no-begin: nothing, and is only read.
    end
        The end of the line is scored; --no-end: not.
    carry
        A line goes on from the one before it, as one document; otherwise every line is scored afresh.
    unknown
        What <unk> is worth: count, its own probability; skip, left out; spell, times that of its letters, all alike.
    most_tokens
        Longer lines are not scored.
    nbest
        Lines are an utterance's id, a score elsewhere and a hypothesis, parted by tabs (or in JSON): show each
        utterance's best, or all, the best first, by OTHER_WEIGHT * score + WEIGHT * log_prob + TOKEN_BONUS * tokens.
    weight, other_weight, token_bonus
        For nbest.
    anomalies
        Show so many lines, the oddest by nats per token first, with their oddest words.
    """
    from unrolled.inference.rescore import Hypothesis, oddest, rescore
    from unrolled.items import Scored, json_item, nbest_item, plain_item, read_items

    if nbest and (anomalies or carry):
        raise UnrolledError("--nbest goes with neither --anomalies nor --carry")
    read = json_item(text_field, id_field, score_field) if from_json else nbest_item if nbest else plain_item
    model = unrolled.load(run, device, precision)
    scorer = model.scorer(begin=begin, end=end, unknown=unknown, most_tokens=most_tokens)
    scored = Scored(scorer, read_items(file, read), carry)
    printer = ScorePrinter(per_token, base, json)
    if nbest:
        found = rescore(
            (Hypothesis(item.id, item.other, result) for item, result in scored.scores()),
            weight,
            other_weight,
            token_bonus,
        )
        for group in found.values():
            for total, hypothesis in group if nbest == "all" else group[:1]:
                printer.hypothesis(hypothesis.id, total, hypothesis.other, hypothesis.score)
    elif anomalies:
        for id, result, words in oddest(((item.id, result) for item, result in scored.scores()), anomalies):
            printer.anomaly(id, result, words)
    else:
        for item, result in scored:
            printer.line(item, result)
    for wrong in scored.wrong:
        notice(f"line {wrong}")
    if scored.failed:
        notice(f"{scored.failed} of {scored.seen} lines could not be scored")


@app.command
def predict(
    run: RunFolder,
    prefix: Annotated[str | None, Parameter(help="A text; standard input, line by line, when left out.")] = None,
    /,
    *,
    k: Annotated[Whole, Parameter(name=["-k", "--k"])] = 10,
    complete: bool = False,
    words: Whole = 1,
    unknown: bool = False,
    device: Device = "auto",
    precision: Precision = "f32",
    json: Json = False,
) -> None:
    """The likeliest next words after a text, with their probabilities.

    Parameters
    ----------
    k
        How many.
    complete
        The last word is still being typed: name the words that it may become.
    words
        Name the likeliest so many tokens in a row, found by a beam search.
    unknown
        Let <unk> be among them.
    """
    from unrolled.data.tokens import shown
    from unrolled.items import plain_item, read_items

    if complete and words != 1:
        raise UnrolledError("--complete and --words exclude each other")
    model = unrolled.load(run, device, precision)

    def answers(texts: list[str]) -> list[list[tuple[str, float]]]:
        if words == 1:
            return [found.words for found in model.predict_many(texts, k, unknown, complete)]
        width = max(k, 20)
        found = [model.continuations(text, words, k, width=width, unknown=unknown) for text in texts]
        return [[(text.removeprefix(" "), math.exp(value)) for text, value in pairs] for pairs in found]

    def print_answer(text: str, pairs: list[tuple[str, float]]) -> None:
        if json:
            print_json({"prefix": text, "words": [{"word": word, "probability": value} for word, value in pairs]})
            return
        print(f"{text} …\n" * (prefix is None), end="")
        print(*(f"{_share(value)}  {shown(word) if words == 1 else visible(word)}" for word, value in pairs), sep="\n")
        sys.stdout.flush()

    if prefix is not None:
        found = answers([utf8(prefix)])[0]
        notice_unknown(
            model.tokenizer, prefix.removesuffix(prefix.split()[-1]) if complete and prefix.split() else prefix
        )
        print_answer(prefix, found)
        if not found:
            notice(f"no word of this model begins with {prefix.split()[-1]!r}")
        return
    for batch in read_items("-", plain_item):
        wrong = next((item for item in batch if item.error), None)
        texts = [item.text for item in batch if not item.error]
        for text, pairs in zip(texts, answers(texts), strict=True):
            print_answer(text, pairs)
        if wrong:
            raise UnrolledError(f"standard input, line {wrong.id}: {wrong.error}")


def _share(probability: float) -> str:
    return f"{probability:9.3%}" if probability >= 5e-6 else f"{probability:9.1e}"


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
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    ban: Annotated[tuple[Text, ...], Parameter(negative=())] = (),
    stop: Annotated[tuple[Text, ...], Parameter(negative=())] = (),
    samples: Whole = 1,
    detokenize: bool = False,
    seed: Whole | None = None,
    unknown: bool = False,
    random_start: bool = False,
    device: Device = "auto",
    precision: Precision = "f32",
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
    min_p
        Draw among those at least so likely, as a share of the likeliest; 0 for all.
    repetition_penalty
        The log-probability of what has come before is multiplied by it; 1 for none.
    ban
        A token that is never drawn; may be given several times.
    stop
        The text ends before this; may be given several times.
    samples
        So many texts, drawn side by side.
    detokenize
        Text for people: punctuation beside its word, contractions whole.
    seed
        The same seed writes the same text.
    unknown
        Let <unk> be drawn.
    random_start
        Begin with a token drawn from all alike, instead of at the beginning of a line.
    """
    if prompt is not None and prompt_file is not None:
        raise UnrolledError("--prompt and --prompt-file exclude each other")
    if random_start and (prompt is not None or prompt_file is not None):
        raise UnrolledError("--random-start and a prompt exclude each other")
    if prompt_file is not None or prompt == "-":
        prompt = "\n".join(read_lines(str(prompt_file or "-")))
    prompt = utf8(prompt or "")
    model = unrolled.load(run, device, precision)
    from unrolled.inference.detokenize import detokenize as joined
    from unrolled.inference.generate import new_seed

    seed = new_seed() if seed is None else seed
    options: dict[str, Any] = {
        "length": length,
        "seed": seed,
        "random_start": random_start,
        "stop": stop,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "banned": ban,
        "unknown": unknown,
    }
    notice_unknown(model.tokenizer, prompt)
    if samples == 1 and not json and not detokenize:
        piece = prompt
        print(prompt, end="", flush=True)
        for piece in model.stream(prompt, **options):
            print(piece, end="", flush=True)
        print("" if piece.endswith("\n") else "\n", end="")
        return
    texts = model.generate_many(prompt, samples, **options)
    whole = [joined(prompt + text) if detokenize else prompt + text for text in texts]
    for text, shown in zip(texts, whole, strict=True):
        if json:
            answer = {"prompt": prompt, "text": text, "tokens": length, "seed": seed}
            print_json(answer | ({"detokenized": shown} if detokenize else {}))
        else:
            print(shown, end="\n\n" if samples > 1 else "\n")


@app.command
def serve(
    *runs: RunFolder,
    host: str = "127.0.0.1",
    port: Whole = 8000,
    token: str | None = None,
    device: Device = "auto",
    precision: Precision = "f32",
    threads: Annotated[Whole, Parameter(show_default=False)] = 0,
    most_tokens: Whole = 200_000,
    most_samples: Whole = 64,
    most_seconds: float = 60.0,
    most_requests: Whole = 256,
    most_sessions: Whole = 1_000,
) -> None:
    """Answer over HTTP, and with a page to type into; Ctrl-C ends it.

    The page is at /, a description of all that can be asked at /docs, completions by OpenAI's protocol at /v1.

    Parameters
    ----------
    runs
        Run folders; each goes by its folder's name, and the first answers where none is named.
    host
        The address to listen at: as it is, only this machine can reach it; 0.0.0.0 for all who can reach this machine.
    port
        Of that address; 0 for any that is free.
    token
        Requests have to bear it; UNROLLED_TOKEN says it without showing it to others on this machine.
    threads
        That computing may use; all cores but one when left out.
    most_tokens
        Read or drawn by one request.
    most_samples
        Drawn by one request.
    most_seconds
        Until a request is given up.
    most_requests
        Under way at the same time.
    most_sessions
        Kept; the one unused for longest gives way.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would take the core that takes requests
    if not runs:
        raise UnrolledError("unrolled serve wants one or more run folders")
    try:
        from unrolled.serving.server import serve as answer
    except ImportError as error:
        raise UnrolledError("serving needs FastAPI: pip install 'unrolled[serve]'") from error
    from unrolled.serving.limits import Limits

    if not 0 <= port <= 65535:
        raise UnrolledError(f"--port must be from 0 to 65535, not {port}")
    for name, value, least in (
        ("threads", threads, 0),
        ("most-tokens", most_tokens, 1),
        ("most-samples", most_samples, 1),
        ("most-requests", most_requests, 1),
        ("most-sessions", most_sessions, 1),
    ):
        if value < least:
            raise UnrolledError(f"--{name} must be at least {least}, not {value}")
    if not most_seconds > 0:
        raise UnrolledError(f"--most-seconds must be more than 0, not {most_seconds:g}")
    opened: dict[str, Any] = {}
    for run in runs:
        loaded = unrolled.load(run, device, precision)
        if loaded.folder.name in opened:
            raise UnrolledError(f"two of the folders are named {loaded.folder.name!r}, by which models are told apart")
        opened[loaded.folder.name] = loaded
    limits = Limits(
        tokens=most_tokens,
        samples=most_samples,
        seconds=most_seconds,
        requests=most_requests,
        sessions=most_sessions,
    )
    token = token or os.environ.get("UNROLLED_TOKEN") or None
    threads = threads or max(1, (os.cpu_count() or 1) - 1)
    answer(opened, host, port, limits, token, threads, lambda address: notice(f"{', '.join(opened)} at {address}"))


@app.command
def inspect(run: RunFolder, /, *, json: Json = False) -> None:
    """What a run folder holds: parameters by name and shape, vocabulary, provenance."""
    from unrolled.data.tokens import shown

    opened = unrolled.load(run, "cpu")
    parameters = {name: list(tensor.shape) for name, tensor in opened.model.named_parameters()}
    if json:
        recipe = opened.recipe.model_dump(mode="json")
        vocabulary = opened.tokenizer.vocabulary
        print_json(
            {"run": str(run), "parameters": parameters, "vocabulary": vocabulary, "recipe": recipe} | opened.manifest
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
    if manifest["status"] == "done":
        print_results(opened)


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
    if len({run.resolve() for run in runs}) < len(runs):
        raise UnrolledError("report takes each run once")
    if words < 0:
        raise UnrolledError(f"--words must be 0 or more, not {words}")
    if out is not None and out.is_dir():
        raise UnrolledError(f"{out} is a folder; --out names the file")
    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_report([unrolled.load(run, "cpu") for run in runs], path, words)
    print(path)


@app.command
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


@data_app.command(name="list")
def data_list(*, json: Json = False) -> None:
    """The known corpora and whether they are on this machine."""
    from unrolled.data.text import KNOWN, find

    for name, known in KNOWN.items():
        place = "embedded" if not known.archive else str(find(name) or "not here; unrolled data fetch " + name)
        if json:
            print_json({"name": name, "about": known.title, "place": place})
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
        print_json({"name": dataset.name, "note": dataset.note, "vocab_size": len(dataset.tokenizer), "splits": splits})
        return
    rows = [[s, f"{i['tokens']:,}", f"{i['unknown']:,}", i["sha256"]] for s, i in splits.items()]
    print_table([dataset.name, f"{tokens}s", "<unk>", "SHA-256"], rows)
    print(f"vocabulary {len(dataset.tokenizer):,}" + (f"; {dataset.note}" if dataset.note else ""))
    print("begins: " + (dataset.tokenizer.decode(dataset.ids["train"][:200])[:200].splitlines() or [""])[0])


@app.command
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

    Parameters
    ----------
    recipe
        Recipes, by name or file.
    task
        train, score (64 streams), next-word (one stream).
    subject
        What to time beside the baseline, torch f32; all of ours and PyTorch's when left out. NAME=COMMAND is another
        program that trains, see benchmarks/peers.
    rounds
        How often each is timed.
    seconds
        How long one of them takes, about.
    """
    from unrolled import bench as benchmark

    for name in recipe:
        rows = []
        for answer in benchmark.bench(name, task, subject or tuple(benchmark.SUBJECTS), rounds, seconds):
            if json:
                print_json(answer)
                continue
            digits = 1 if answer["unit"] == "µs" else 0
            spread = [figure(answer[which], digits) for which in ("median", "minimum", "maximum")]
            share = answer["share_of_ceiling"]
            shown = "" if share is None else f"{share:.0%}"
            rows.append([answer["task"], answer["subject"], *spread, answer["unit"]])
            memory = answer["peak_memory_mib"]
            rows[-1] += [figure(answer["ratio_to_baseline"], 2), shown, "" if memory is None else f"{memory:,.0f}"]
        if rows:
            heads = [name, "", "median", "least", "most", "", "ratio", "of the ceiling", "MiB"]
            print_table(heads, rows)


@kernels_app.command(name="build")
def kernels_build(*, again: bool = False) -> None:
    """Compile the kernels for this processor, with its C++ compiler (CXX, or g++). They are kept in the cache.

    Parameters
    ----------
    again
        Even where they are there.
    """
    from unrolled.kernels.build import build, chosen_level

    print(f"{chosen_level()}: {build(again)}")


@kernels_app.command(name="status")
def kernels_status(*, json: Json = False) -> None:
    """Which kernels this processor can run, and whether they are built."""
    from unrolled.kernels.build import chosen_level, compiler, in_use, library_path

    level, command = chosen_level(), compiler()
    answer = {
        "in_use": in_use(),
        "level": level or "off",
        "library": str(library_path(level)) if level else None,
        "compiler": " ".join(command) if command else None,
    }
    if json:
        print_json(answer)
        return
    print_table(["", ""], [[name.replace("_", " "), value or "none"] for name, value in answer.items()])
    if answer["in_use"] == "none" and level:
        notice("not built: unrolled kernels build")


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
        fail("too many arguments: " + " ".join(error.unused_tokens or []))
    except CycloptsError as error:
        fail(str(error))
    except UnrolledError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:  # a fault of ours: one line all the same
        if os.environ.get("UNROLLED_TRACEBACK"):
            raise
        fail(f"internal error, please report it: {error!r} (UNROLLED_TRACEBACK=1 shows where)", 1)
    sys.exit(status or 0)
