"""The commands that put a model to use: score, predict, generate, serve."""

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

import unrolled
from unrolled.answers import ScorePrinter, notice, notice_unknown, print_json, read_lines, utf8, visible
from unrolled.commands.kinds import Device, Json, Precision, RunFolder, Text, Whole
from unrolled.errors import UnrolledError


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
        Lines are objects in JSON with a text, and perhaps an id, which --json and --anomalies answer with.
    text_field
        What the text is called there.
    id_field
        What the id is called there.
    score_field
        What a score elsewhere is called there, for --nbest.
    base
        Of the logarithms, that of --nbest too.
    begin
        The first token follows the end of a line; --no-begin: nothing, and is only read.
    end
        The end of the line is scored; --no-end: not.
    carry
        A line goes on from the one before it, as one document; otherwise every line is scored afresh.
    unknown
        What <unk> is worth: count, its own probability; skip, left out; spell, times that of its letters, each equally
        likely.
    most_tokens
        Longer lines are not scored.
    nbest
        Lines are an utterance's id, a score elsewhere and a hypothesis, parted by tabs (or in JSON): show each
        utterance's best, or all, the best first, by OTHER_WEIGHT * score + WEIGHT * log_prob + TOKEN_BONUS * tokens.
    weight
        Of this model's log-probability, for --nbest.
    other_weight
        Of the score elsewhere, for --nbest.
    token_bonus
        For each token, for --nbest.
    anomalies
        Show so many lines, the oddest by nats per token first, with their oddest words.
    """
    from unrolled.inference.rescore import Hypothesis, oddest, rescore
    from unrolled.items import Scored, json_item, nbest_item, plain_item, read_items

    if nbest and (anomalies or carry):
        raise UnrolledError("--nbest goes with neither --anomalies nor --carry")
    for name, value in {"weight": weight, "other-weight": other_weight, "token-bonus": token_bonus}.items():
        if not math.isfinite(value):
            raise UnrolledError(f"--{name} must be a finite number, not {value}")
    if anomalies < 0:
        raise UnrolledError(f"--anomalies must be at least 0, not {anomalies}")
    read = nbest_item if nbest else plain_item
    if from_json:
        read = json_item(text_field, id_field, score_field if nbest else None)
    model = unrolled.load(run, device, precision)
    scorer = model.scorer(begin=begin, end=end, unknown=unknown, most_tokens=most_tokens)
    scored = Scored(scorer, read_items(file, read), carry)
    printer = ScorePrinter(per_token, base, json, ids=from_json)
    if nbest:
        found = rescore(
            (Hypothesis(item.id, item.other, result) for item, result in scored.scores()),
            weight / printer.nats,
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
        notice(wrong)
    if scored.failed:
        notice(f"{scored.failed} of {scored.seen} lines could not be scored")


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
        How many tokens to predict in a row, found by a beam search.
    unknown
        Let <unk> be among them.
    """
    from unrolled.data.tokens import shown
    from unrolled.inference.generate import MOST_SAMPLES, MOST_WORDS, Question, last_word
    from unrolled.items import Item, plain_item, read_items

    if complete and words != 1:
        raise UnrolledError("--complete and --words exclude each other")
    if not 1 <= words <= MOST_WORDS:
        raise UnrolledError(f"--words must be from 1 to {MOST_WORDS}, not {words}")
    if words != 1 and not 1 <= k <= MOST_SAMPLES:
        raise UnrolledError(f"-k must be from 1 to {MOST_SAMPLES} where --words is not 1, not {k}")
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
        found, typed = answers([utf8(prefix)])[0], last_word(prefix) if complete else ""
        notice_unknown(model.tokenizer, prefix.removesuffix(typed))
        print_answer(prefix, found)
        if not found:
            notice(f"no word of this model begins with {typed!r}")
        return

    def checked(number: int, line: str) -> Item:
        Question(model.tokenizer, line, k, unknown, complete)
        return plain_item(number, line)

    for batch in read_items("-", checked):
        wrong = next((item for item in batch if item.error), None)
        texts = [item.text for item in batch[: batch.index(wrong) if wrong else None]]
        for text, pairs in zip(texts, answers(texts), strict=True):
            print_answer(text, pairs)
        if wrong:
            raise UnrolledError(f"standard input, line {wrong.id}: {wrong.error}")


def _share(probability: float) -> str:
    return f"{probability:9.3%}" if probability >= 5e-6 else f"{probability:9.1e}"


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
        Begin with a random token, each equally likely, instead of at the beginning of a line.
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
    from unrolled.inference.generate import Drawing, new_seed
    from unrolled.inference.sampling import Sampling

    seed = new_seed() if seed is None else seed
    sampling: dict[str, Any] = {
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
        for piece in model.stream(prompt, length=length, seed=seed, random_start=random_start, stop=stop, **sampling):
            print(piece, end="", flush=True)
        print("" if piece.endswith("\n") else "\n", end="")
        return
    drawing = Drawing(model.tokenizer, prompt, samples, length, seed, random_start, stop, Sampling(**sampling))
    with model.rounded():
        texts = drawing.texts(model.model)
    whole = [joined(prompt + text) if detokenize else prompt + text for text in texts]
    for text, shown, tokens in zip(texts, whole, drawing.tokens, strict=True):
        if json:
            answer = {"prompt": prompt, "text": text, "tokens": tokens, "seed": seed}
            print_json(answer | ({"detokenized": shown} if detokenize else {}))
        else:
            print(shown, end="\n\n" if samples > 1 else "\n")


_SERVED = "Run folders; each goes by its folder's name, and the first answers where none is named."


def serve(
    *runs: Annotated[Path, Parameter(help=_SERVED, show_default=False)],
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
    host
        The address to listen at: as it is, only this machine can reach it; 0.0.0.0 for all who can reach this machine.
    port
        Of that address; 0 for any that is free.
    token
        Requests have to bear it; UNROLLED_TOKEN says it without showing it to others on this machine.
    threads
        That computing may use; all cores but one when left out.
    most_tokens
        The most that one request may read or draw.
    most_samples
        The most that one request may draw.
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
