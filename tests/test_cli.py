"""The command: every answer, and every mistake in one line with exit status 2."""

import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import unrolled
from unrolled import Run, folder, items
from unrolled.cli import main
from unrolled.data import archives
from unrolled.data.embedded import toy_text
from unrolled.data.text import KNOWN, KnownCorpus

Write = Callable[[str, bytes | str], Path]


class Command:
    """Runs `unrolled …` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object, stdin: Path | None = None) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with open(stdin or os.devnull, encoding="utf-8") as file:
            self.monkeypatch.setattr("sys.stdin", file)
            with pytest.raises(SystemExit) as stopped:
                main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    def json(self, *arguments: object, stdin: Path | None = None) -> list[dict]:
        status, out, err = self(*arguments, "--json", stdin=stdin)
        assert status == 0, err
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(capsys, monkeypatch)


TINY = ("--max-epochs", 1, "--model.hidden-sizes", 8, "--model.embedding-size", 8, "--training.batch-size", 100)


# ------------------------------------------------------------------------------------------------ answers


def test_train_answers_a_program_line_by_line(command: Command, tmp_path: Path) -> None:
    lines = command.json("train", "demo", "--data", "toy", "--out", tmp_path / "run", *TINY[2:], "--max-epochs", 2)
    assert [set(line) for line in lines[:-1]] == [
        {
            *("epoch", "train_perplexity", "valid_perplexity", "valid_protocol"),
            *("learning_rate", "tokens_per_second", "elapsed_s"),
        }
    ] * 2
    assert lines[-1]["run"] == str(tmp_path / "run")
    assert lines[-1]["best_epoch"] in (1, 2)
    assert lines[-1]["test"] == command.json("evaluate", tmp_path / "run")[0]


def test_train_shows_progress_on_standard_error_and_results_on_standard_output(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = command("train", "--data", "toy", *TINY)
    assert status == 0
    assert "before training: 3.6" in err
    assert "tokens/s" in err
    assert "unigram" in out
    assert "run folder runs/demo-1" in out
    status, out, err = command("train", "--data", "toy", *TINY, "--quiet")
    assert err == ""
    assert "run folder runs/demo-2" in out


def test_evaluate_answers_with_every_figure(command: Command, toy_run: Run, write: Write) -> None:
    (answer,) = command.json("evaluate", toy_run.path, "--split", "valid")
    assert set(answer) == {
        *("run", "corpus", "split", "protocol", "tokens", "nll_nats", "perplexity", "bits_per_token"),
        *("characters", "bits_per_character", "unknown", "precision"),
    }
    (paper,) = command.json("evaluate", toy_run.path, "--split", "valid", "--protocol", "paper")
    assert paper["tokens"] < answer["tokens"]
    text = write("mine.txt", "the dog walks\nbirds sing\n")
    (other,) = command.json("evaluate", toy_run.path, "--data", text)
    assert (other["corpus"], other["split"], other["tokens"]) == ("mine.txt", "text", 6)
    with zipfile.ZipFile(archive := text.with_name("mine.zip"), "w") as file:
        for split in ("train", "valid", "test"):
            file.write(text, f"{split}.txt")
    (piped,) = command.json("evaluate", toy_run.path, "--data", "-", stdin=archive)
    assert (piped["split"], piped["nll_nats"]) == ("test", other["nll_nats"])
    status, out, _ = command("evaluate", toy_run.path)
    assert status == 0
    assert "perplexity" in out
    with zipfile.ZipFile(archive, "w") as file:
        file.write(text, "novel.txt")
    (alone,) = command.json("evaluate", toy_run.path, "--data", archive)
    assert (alone["split"], alone["nll_nats"]) == ("text", other["nll_nats"])
    packed = write("mine.txt.gz", gzip.compress(text.read_bytes()))
    assert "mine.txt.gz is compressed" in mistake(command, "evaluate", toy_run.path, "--data", packed)


def test_text_that_has_changed_since_is_not_what_was_trained_on(
    command: Command, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write("mine.txt", toy_text("valid")[:30_000])
    command("train", "--data", text, "--out", tmp_path / "run", *TINY)
    text.write_text(toy_text("test")[:30_000])
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "cache"))
    error = mistake(command, "evaluate", tmp_path / "run", "--split", "train")
    assert "has changed since the training" in error


def test_what_was_trained_on_is_evaluated_when_its_text_is_gone(command: Command, write: Write, tmp_path: Path) -> None:
    text = write("mine.txt", toy_text("train"))
    run = unrolled.train("demo", data=str(text), out=tmp_path / "run", changes={"training.max_epochs": 1})
    text.unlink()
    (answer,) = command.json("evaluate", run.path, "--split", "train")
    assert (answer["split"], answer["tokens"]) == ("train", run.manifest["corpus"]["splits"]["train"]["tokens"] - 1)


def test_a_run_without_its_results_is_shown_without_them(command: Command, toy_run: Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(toy_run.path, tmp_path / "run"))
    manifest = folder.read_manifest(run)
    del manifest["results"]
    folder.write_manifest(run, manifest)
    status, out, err = command("inspect", run)
    again = f"unrolled train --resume --out {run} makes them again"
    assert (status, err) == (0, f"unrolled: its results are not there; {again}\n")
    assert "SHA-256" in out


def test_predict_answers_for_one_prefix_or_many(command: Command, toy_run: Run, write: Write) -> None:
    (answer,) = command.json("predict", toy_run.path, "the dog", "-k", 3)
    assert answer["prefix"] == "the dog"
    assert [set(word) for word in answer["words"]] == [{"word", "probability"}] * 3
    many = command.json("predict", toy_run.path, "-k", 3, stdin=write("prefixes", "the dog\nbirds\n"))
    assert [word["word"] for word in many[0]["words"]] == [word["word"] for word in answer["words"]]
    for one, other in zip(many[0]["words"], answer["words"], strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
    assert many[1]["prefix"] == "birds"
    _, out, _ = command("predict", toy_run.path, "the dog", "-k", 3)
    assert out.split()[1::2] == [word["word"] for word in answer["words"]]


def test_predict_answers_up_to_a_line_that_it_cannot_read(command: Command, character_run: Run, write: Write) -> None:
    status, out, err = command("predict", character_run.path, "-k", 1, stdin=write("prefixes", "the\na\nQ\nthe\n"))
    assert (status, out.count("…")) == (2, 2)
    assert "standard input, line 3: the character 'Q' is not in the model's vocabulary" in err


def test_generate_answers_and_streams_the_same(command: Command, toy_run: Run, write: Write) -> None:
    (answer,) = command.json("generate", toy_run.path, "--prompt", "the dog", "--length", 15, "--seed", 4)
    assert answer | {"text": ""} == {"prompt": "the dog", "text": "", "tokens": 15, "seed": 4}
    _, out, _ = command("generate", toy_run.path, "--prompt", "the dog", "--length", 15, "--seed", 4)
    assert out == "the dog" + answer["text"] + "\n"
    _, out, _ = command("generate", toy_run.path, "--prompt-file", write("p", "the dog\n"), "--length", 15, "--seed", 4)
    assert out == "the dog" + answer["text"] + "\n"
    (first,) = command.json("generate", toy_run.path, "--length", 5)
    (again,) = command.json("generate", toy_run.path, "--length", 5, "--seed", first["seed"])
    assert again == first


def test_score_answers_line_by_line_in_order(command: Command, toy_run: Run, write: Write) -> None:
    lines = write("lines.txt", "the dog walks\nthe zebra walks\n\n")
    answers = command.json("score", toy_run.path, lines, "--per-token")
    assert [answer["id"] for answer in answers] == [1, 2, 3]
    assert [answer["unknown"] for answer in answers] == [0, 1, 0]
    assert [answer["tokens"] for answer in answers] == [4, 4, 1]
    for answer in answers:
        total = sum(token["log_prob"] for token in answer["per_token"])
        assert answer["log_prob"] == pytest.approx(total)
        assert answer["perplexity"] == pytest.approx(math.exp(-total / answer["tokens"]))
    assert command.json("score", toy_run.path, "-", stdin=lines) == [
        {key: value for key, value in answer.items() if key != "per_token"} for answer in answers
    ]
    _, out, _ = command("score", toy_run.path, lines, "--per-token")
    assert "the zebra walks" in out


def test_words_are_completed_and_several_are_predicted(command: Command, toy_run: Run) -> None:
    (answer,) = command.json("predict", toy_run.path, "the d", "--complete")
    assert all(word["word"].startswith("d") for word in answer["words"])
    (answer,) = command.json("predict", toy_run.path, "the", "--words", 3, "-k", 4)
    assert [len(word["word"].replace("\n", " <eos>").split()) for word in answer["words"]] == [3] * 4
    assert "exclude each other" in mistake(command, "predict", toy_run.path, "the d", "--complete", "--words", 3)


def test_a_prefix_that_begins_with_a_hyphen_goes_where_it_is_told_to(command: Command, toy_run: Run) -> None:
    for prefix in ("- the", "-known as", "--the dog"):
        assert "begins with a hyphen goes after --\n" in mistake(command, "predict", toy_run.path, prefix)
        status, out, _ = command("predict", toy_run.path, "-k", 3, "--", prefix)
        assert (status, len(out.splitlines())) == (0, 3)


def test_what_is_printed_in_json_is_json_whatever_the_terminal_shows(toy_run: Run) -> None:
    for encoding in ("ascii", "latin-1", "utf-8"):
        command = [sys.executable, "-m", "unrolled", "predict", toy_run.path, "naïve 🙂", "--json"]
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        found = subprocess.run(command, env=environment, capture_output=True, check=True)
        assert json.loads(found.stdout)["prefix"] == "naïve 🙂"


def test_several_texts_are_written(command: Command, toy_run: Run) -> None:
    options = ("--prompt", "the dog", "--seed", 3, "--samples", 3, "--ban", "walks", "--ban", "walk", "--stop", "\n")
    answers = command.json("generate", toy_run.path, *options, "--detokenize")
    assert len(answers) == 3
    for answer in answers:
        assert answer["tokens"] == len(answer["text"].split()) + (answer["tokens"] < 100)  # the stop is a token too
        assert "\n" not in answer["text"]
        assert "walk" not in answer["text"].replace("walked", "").split()
        assert answer["detokenized"].startswith("the dog")
    status, out, _ = command("generate", toy_run.path, *options)
    assert (status, sum(line.startswith("the dog") for line in out.splitlines())) == (0, 3)


def test_inspect_lists_parameters_by_name_and_shape(command: Command, toy_run: Run) -> None:
    (answer,) = command.json("inspect", toy_run.path)
    assert answer["parameters"]["layers.0.weight_ih"] == [256, 32]
    assert len(answer["vocabulary"]) == answer["vocab_size"]
    assert answer["recipe"] == toy_run.recipe.model_dump(mode="json")
    _, out, _ = command("inspect", toy_run.path)
    assert "256 × 32" in out
    assert f"{toy_run.model.num_parameters():,}" in out


def test_recipes_are_listed_and_shown(command: Command) -> None:
    assert [line["name"] for line in command.json("recipes")] == [
        "demo",
        *(f"ptb-{size}" for size in ("large", "medium", "notebook", "small")),
        *(f"text8-{name}" for name in ("elman", "elman-add", "elman-relu", "jordan", "lstm")),
    ]
    _, out, _ = command("recipes")
    assert "115.91" in out
    _, out, _ = command("recipes", "ptb-small")
    assert "hidden_sizes" in out


def test_corpora_are_listed_shown_and_imported(
    command: Command, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {line["name"] for line in command.json("data", "list")} == {"stdlib", "toy", "ptb", "text8"}
    (shown,) = command.json("data", "show", "toy")
    assert shown["splits"]["train"]["tokens"] > 100_000
    _, out, _ = command("data", "show", write("mine.txt", "a few words here\n" * 100))
    assert "cut 90/5/5" in out
    assert "begins: a few words" in out
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNROLLED_DATA", raising=False)
    status, out, _ = command("data", "import", "text8", write("text8", "some text " * 50))
    assert status == 0
    assert "the first 500 characters of text8" in out
    _, out, _ = command("data", "list")
    assert str(tmp_path / "cache") in out


def test_resume_needs_no_recipe_and_goes_on(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command("train", "--data", "toy", "--out", out, *TINY)
    lines = command.json("train", "--resume", "--out", out, "--max-epochs", 2)
    assert [line.get("epoch") for line in lines] == [2, None]


# ------------------------------------------------------------------------------------------------ mistakes


def mistake(command: Command, *arguments: object, stdin: Path | None = None) -> str:
    status, out, err = command(*arguments, stdin=stdin)
    assert (status, out) == (2, "")
    assert err.startswith("unrolled: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], 'Did you mean "train"'),
        (["train", "ptb-smal"], "no recipe named 'ptb-smal'; did you mean 'ptb-small'? (unrolled recipes lists them)"),
        (["train", "--bacth-size", "3"], "Unknown option"),
        (["train", "--training.bacth-size", "3"], "Did you mean --training.batch-size"),
        (["train", "--training.num-steps", "0"], "--training.num-steps must be at least 1, not 0"),
        (["train", "--max-epochs", "-1"], "--training.max-epochs must be at least 1, not -1"),
        (["train", "--seed", "lucky"], "--training.seed must be a whole number, not lucky"),
        (["train", "--precision", "f16"], "--training.precision must be 'auto', 'f32' or 'bf16', not f16"),
        (["train", "--data", "toy", "--device", "abacus", "--out", "x"], "no device 'abacus' here"),
        (["train", "--max-epochs"], "requires an argument"),
        (["train", "demo", "more", "still"], "too many arguments: more still\n"),
        (["predict", "runs/x", "the", "old", "dog"], "too many arguments: old dog; a text goes in quotes\n"),
        (["generate", "runs/x", "the old"], "too many arguments: the old; a text goes after --prompt, in quotes\n"),
        (["train", "--data", "no-such-file.txt"], "no corpus or file 'no-such-file.txt'"),
        (
            ["train", "--data", "toy", "--encoding", "klingon", "--data.tokens", "byte", "--model.cell", "x"],
            "'lstm', 'gru', 'elman' or 'jordan'",
        ),
        (["train", "--data", "toy", "--quiet", "--model.hidden-sizes", "9999999"], "lower --model.hidden-sizes"),
        (["train", "--encoding", "rot13", "--data", __file__], "no encoding named 'rot13'"),
        (["train", "--data", "toy", "--quiet", "--training.batch-size", "999999999"], "tokens are too few"),
        (["train", "--data", "toy", "--model.init-scale", "1e39"], "--model.init-scale must be at most"),
        (["train", "--data", "toy", "--device", "meta"], "no device 'meta' here"),
        (["train", "--resume", "--out", "nowhere"], "nowhere holds nothing to resume"),
        (["train", "--resume"], "holds nothing to resume"),
        (["evaluate"], "requires an argument"),
        (["evaluate", "nowhere"], "no run folder 'nowhere'"),
        (["predict", "nowhere", "a"], "no run folder 'nowhere'"),
        (["inspect", "."], "is not a run folder"),
        (["recipes", "nothing"], "no recipe named 'nothing'"),
        (["data", "fetch", "pbt"], "no corpus named 'pbt'; did you mean 'ptb'?"),
        (["data", "fetch", "stdlib"], "needs no download"),
        (["data", "import", "ptb", "nowhere.tgz"], "no file 'nowhere.tgz'"),
        (["data", "show", "nothing.txt"], "no corpus or file 'nothing.txt'"),
        (["data", "show", "toy", "--tokens", "sentence"], 'Invalid value "sentence" for --tokens'),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    command: Command, arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in mistake(command, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["predict", "a", "-k", "0"], "k must be at least 1, not 0"),
        (["predict", "a", "-k", "many"], "many"),
        (["generate", "--seed", "99999999999999999999"], "seed must be at least 0 and below 2 to the 63rd"),
        (["predict", "caf\udce9"], "is not UTF-8"),
        (["generate", "--length", "-3"], "length must be at least 0"),
        (["generate", "--temperature", "-1"], "temperature must be at least 0"),
        (["generate", "--top-p", "0"], "top-p must be more than 0"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "exclude each other"),
        (["generate", "--prompt-file", "nowhere"], "No such file or directory: nowhere"),
        (["evaluate", "--split", "tests"], "no split 'tests'"),
        (["evaluate", "--protocol", "exakt"], "exakt"),
        (["evaluate", "--device", "abacus"], "no device 'abacus' here"),
        (["score", "nowhere.txt"], "no file 'nowhere.txt'; for a text itself: echo"),
    ],
)
def test_a_mistake_with_a_run_is_one_line_and_status_2(
    command: Command, toy_run: Run, arguments: list[str], expected: str
) -> None:
    assert expected in mistake(command, arguments[0], toy_run.path, *arguments[1:])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "mine.txt is empty"),
        (b"good\nb\xffd\n" * 50, "mine.txt, line 2, byte 2: not UTF-8 (0xff); convert the file or pass --encoding"),
        (b"good\n\0\n" * 50, "mine.txt, line 2, byte 1: a NUL"),
        (b"too short\n" * 25, "tokens are too few"),
        (b"\n" * 50, "tokens are too few"),
        (b"word" * 100, "tokens are too few"),
        (b"word", "the valid split holds no token; give more text"),
    ],
)
def test_a_text_that_cannot_be_trained_on_is_one_line(
    command: Command, write: Write, tmp_path: Path, content: bytes, expected: str
) -> None:
    path = write("mine.txt", content)
    assert expected in mistake(command, "train", "--quiet", "--data", path, "--out", tmp_path / "run")
    assert expected in mistake(
        command, "train", "--quiet", "--data", "-", "--out", tmp_path / "run", stdin=path
    ).replace("standard input", "mine.txt")
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_over(command: Command, toy_run: Run) -> None:
    assert "exists already" in mistake(command, "train", "--quiet", "--data", "toy", *TINY, "--out", toy_run.path)


def test_what_a_broken_off_start_left_is_written_over_and_a_file_is_not(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("train", "--quiet", "--data", "toy", *TINY, "--out", run)[0] == 0
    for file in (run / "last").glob("*.safetensors"):
        file.unlink()
    for name in ("metrics.jsonl", "model.safetensors"):
        (run / name).unlink()
    assert "nothing to resume" in mistake(command, "train", "--resume", "--out", run)
    assert command("train", "--quiet", "--data", "toy", *TINY, "--out", run)[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    assert "exists already" in mistake(command, "train", "--data", "toy", *TINY, "--out", tmp_path / "mine")
    assert "is a file" in mistake(command, "train", "--data", "toy", "--out", tmp_path / "mine" / "manifest.json")


def test_a_training_that_is_stopped_has_another_status_than_one_that_is_done(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "unrolled",
        "train",
        "--data",
        "toy",
        "--out",
        tmp_path / "run",
        "--max-epochs",
        "99",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "10%" in line)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert "go on with: unrolled train --resume" in said


def test_a_finished_training_says_so_when_resumed(command: Command, toy_run: Run, tmp_path: Path) -> None:
    run = shutil.copytree(toy_run.path, tmp_path / "run")
    _, _, err = command("train", "--resume", "--out", run)
    assert "is done; to train on, pass --max-epochs above 2" in err


def test_a_text_in_the_place_of_the_recipe_is_answered_with_the_option(command: Command, write: Write) -> None:
    error = mistake(command, "train", write("mine.txt", "the cat sat"))
    assert "to train on that text: --data" in error


def test_an_empty_name_or_an_encoding_of_nothing_is_no_evaluation(command: Command, toy_run: Run) -> None:
    assert "the name of the corpus is empty" in mistake(command, "evaluate", toy_run.path, "--data", "")
    assert "the name of the corpus is empty" in mistake(command, "train", "--data", "", "--out", toy_run.path / "new")
    assert "pass it with --data" in mistake(command, "evaluate", toy_run.path, "--encoding", "utf-16")
    assert "1.5" in mistake(command, "predict", toy_run.path, "the", "-k", "1.5")


def test_a_text_too_short_for_the_paper_protocol_is_answered_with_the_other(
    command: Command, toy_run: Run, write: Write
) -> None:
    error = mistake(command, "evaluate", toy_run.path, "--data", write("few.txt", "the dog"), "--protocol", "paper")
    assert "few.txt holds 3 tokens" in error
    assert "exact takes any text" in error


def test_a_resume_that_asks_for_something_else_says_what(command: Command, toy_run: Run, tmp_path: Path) -> None:
    run = shutil.copytree(toy_run.path, tmp_path / "run")
    error = mistake(command, "train", "--resume", "--out", run, "--training.num-steps", 7, "--seed", 9)
    assert "was begun with other values of training.num_steps, training.seed" in error


def test_unsafe_archives_dead_links_and_wrong_files_are_one_line(
    command: Command, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("../train.txt", "x")
    assert "the archive is refused" in mistake(command, "train", "--data", tmp_path / "bad.zip")
    monkeypatch.setattr(archives, "MAX_BYTES", 0)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w") as archive:
        archive.writestr("train.txt", "x")
    assert "unpacks to more than" in mistake(command, "train", "--data", tmp_path / "bomb.zip")
    assert "it holds b'P'" in mistake(command, "data", "import", "text8", write("text8", "Penn"))
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        KNOWN, "text8", KnownCorpus("", "http://127.0.0.1:9/x", "try a mirror", "text8.zip", ("text8",))
    )
    assert "cannot be fetched" in mistake(command, "data", "fetch", "text8")


def test_figures_that_are_no_numbers_are_null(command: Command, toy_run: Run, write: Write) -> None:
    (answer,) = command.json("evaluate", toy_run.path, "--data", write("empty.txt", "\n\n\n\n"))
    assert answer["bits_per_character"] is None
    status, out, _ = command("evaluate", toy_run.path, "--data", write("empty.txt", "\n\n\n\n"))
    assert (status, "–" in out) == (0, True)


def test_a_line_that_cannot_be_scored_is_said_in_its_place_and_the_rest_go_on(
    command: Command, toy_run: Run, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("bad.txt", b"the dog\n\xffgood\n" + b"the " * 30 + b"\n\nthe dog")
    answers = command.json("score", toy_run.path, path, "--most-tokens", 20)
    assert [answer["id"] for answer in answers] == [1, 2, 3, 4, 5]
    assert "not UTF-8 at byte 1" in answers[1]["error"]
    assert answers[2]["error"] == "30 tokens are more than 20"
    assert answers[3]["tokens"] == 1
    assert answers[4]["log_prob"] == pytest.approx(answers[0]["log_prob"])
    status, out, err = command("score", toy_run.path, path, "--most-tokens", 20)
    assert (status, err) == (0, "unrolled: 2 of 5 lines could not be scored\n")
    assert out.count("[") == 2
    monkeypatch.setattr(items, "_LONGEST", 1 << 20)
    path = write("long.txt", b"the dog\n" + b"the " * (1 << 19) + b"\nthe dog\n")
    answers = command.json("score", toy_run.path, path)
    assert [answer.get("error") for answer in answers] == [None, "a line of more than 1 MiB", None]


def test_scores_in_json_come_back_with_their_ids(command: Command, toy_run: Run, write: Write) -> None:
    lines = [
        {"id": "a", "text": "the dog walks"},
        {"text": "birds sing"},
        {"id": 7},
        ["no"],
        {"id": {"x": 1}, "text": ""},
    ]
    path = write("in.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + "{not json\n")
    answers = command.json("score", toy_run.path, path, "--from-json")
    assert [answer["id"] for answer in answers] == ["a", 2, 7, 4, '{"x": 1}', 6]
    _, out, err = command("score", toy_run.path, path, "--from-json", "--anomalies", 5)
    assert out.count("  id a: the dog walks") == 1
    assert "unrolled: line 3, id 7: no text 'text'" in err
    assert "unrolled: line 6: not JSON" in err
    assert ["error" in answer for answer in answers] == [False, False, True, True, False, True]
    renamed = write("renamed.jsonl", '{"utt": "u", "hyp": "the dog walks"}\n')
    (answer,) = command.json("score", toy_run.path, renamed, "--from-json", "--text-field", "hyp", "--id-field", "utt")
    assert (answer["id"], answer["log_prob"]) == ("u", pytest.approx(answers[0]["log_prob"]))
    endless = write("endless.jsonl", '{"text": "the", "score": ' + "9" * 400 + "}\n")
    (answer,) = command.json("score", toy_run.path, endless, "--from-json")
    assert "error" not in answer  # which only an n-best list reads
    _, _, err = command("score", toy_run.path, endless, "--from-json", "--nbest", "best")
    assert "line 1: 'score' is no finite number" in err


def test_logarithms_have_the_base_that_is_asked_for(command: Command, toy_run: Run, write: Write) -> None:
    lines = write("lines.txt", "the dog walks\n")
    (nats,), (bits,), (tens,) = (
        command.json("score", toy_run.path, lines, "--per-token", "--base", base) for base in ("e", "2", "10")
    )
    assert bits["log_prob"] == pytest.approx(nats["log_prob"] / math.log(2))
    assert tens["log_prob"] == pytest.approx(nats["log_prob"] / math.log(10))
    for one, other in zip(nats["per_token"], bits["per_token"], strict=True):
        assert one["surprisal_bits"] == other["surprisal_bits"] == pytest.approx(-other["log_prob"])


def test_a_document_is_scored_as_evaluate_does(command: Command, toy_run: Run, write: Write) -> None:
    text = write("test.txt", toy_text("test"))
    (expected,) = command.json("evaluate", toy_run.path)
    answers = command.json("score", toy_run.path, text, "--carry", "--no-begin")
    assert sum(answer["tokens"] for answer in answers) == expected["tokens"]
    assert -sum(answer["log_prob"] for answer in answers) == pytest.approx(expected["nll_nats"], rel=1e-6)
    (answer,) = command.json("score", toy_run.path, write("line", "the dog"), "--no-end", "--no-begin")
    assert answer["tokens"] == 1


def test_the_best_hypothesis_of_each_utterance(command: Command, toy_run: Run, write: Write) -> None:
    rows = ["u1\t-10\tthe dog walk here", "u2\t-5\tbirds sing", "u1\t-10.5\tthe dog walks here", "u1\tx\ty"]
    path = write("nbest.tsv", "\n".join(rows))
    status, out, err = command("score", toy_run.path, path, "--nbest", "best")
    assert [line.split("\t")[::2] for line in out.splitlines()] == [["u1", "the dog walks here"], ["u2", "birds sing"]]
    wrong = "line 4: not an id, a finite score and a text, parted by tabs"
    assert (status, err) == (0, f"unrolled: {wrong}\nunrolled: 1 of 4 lines could not be scored\n")
    answers = command.json("score", toy_run.path, path, "--nbest", "all", "--weight", 0)
    assert [(answer["id"], answer["total"]) for answer in answers] == [("u1", -10), ("u1", -10.5), ("u2", -5)]
    options = "--weight", 2, "--other-weight", 0.5, "--token-bonus", 3, "--base", 10
    for answer in command.json("score", toy_run.path, path, "--nbest", "all", *options):
        total = 0.5 * answer["score"] + 2 * answer["log_prob"] + 3 * answer["tokens"]
        assert answer["total"] == pytest.approx(total)
    for option in ("--weight", "--other-weight", "--token-bonus"):
        assert "finite" in mistake(command, "score", toy_run.path, path, "--nbest", "best", option, "nan")
    _, out, _ = command("score", toy_run.path, path, "--nbest", "best", "--per-token")
    assert len(out.splitlines()) == 2 + 5 + 3
    assert "goes with neither" in mistake(command, "score", toy_run.path, path, "--nbest", "best", "--carry")


def test_the_oddest_lines_and_their_oddest_words(command: Command, toy_run: Run, write: Write) -> None:
    path = write("log.txt", "the dog walks here\nthe here the walks dog dog\nbirds sing here\n")
    (answer,) = command.json("score", toy_run.path, path, "--anomalies", 1)
    assert (answer["id"], len(answer["oddest"])) == (2, 3)
    assert answer["oddest"][0]["log_prob"] <= answer["oddest"][1]["log_prob"]
    long = write("long.txt", "the dog walks here " * 20 + "\nhere the the\n")
    (answer,) = command.json("score", toy_run.path, long, "--anomalies", 1)
    assert answer["id"] == 2  # by the token; all together the long one is the less probable
    _, out, _ = command("score", toy_run.path, path, "--anomalies", 2)
    assert out.splitlines()[0].endswith("line 2: the here the walks dog dog")
    assert out.count("oddest: ") == 2
    path = write("log.txt", "\n\nthe the\nthe the\nbirds sing here\n")
    _, out, _ = command("score", toy_run.path, path, "--anomalies", 5)
    assert out.count("oddest: ") == 2  # no empty line, and equal ones once
    status, out, _ = command("score", toy_run.path, path, "--anomalies", 5, "--no-begin", "--no-end")
    assert (status, out.count("oddest: ")) == (0, 2)
    path = write("log.txt", "dog\n")
    assert command("score", toy_run.path, path, "--anomalies", 5, "--no-begin", "--no-end")[:2] == (0, "")
    assert "--anomalies must be at least 0" in mistake(command, "score", toy_run.path, path, "--anomalies", -1)


def test_a_stream_is_answered_line_by_line(toy_run: Run) -> None:
    command = [sys.executable, "-m", "unrolled", "score", toy_run.path, "-", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number, line in enumerate(("the dog walks", "birds sing"), start=1):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == number
        process.stdin.close()
        assert process.wait() == 0


def test_a_character_outside_the_vocabulary_is_named(command: Command, character_run: Run) -> None:
    assert "the character 'Q' is not in the model's vocabulary" in mistake(command, "predict", character_run.path, "Q")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--subject", "nope"], "no subject 'nope'; there are torch f32"),
        (["bench", "--task", "nope"], "no task 'nope'; there are train, score, next-word"),
        (["bench", "--task", "a=b"], "no task 'a=b'"),
        (["bench", "--rounds", "0"], "one round or more"),
        (["bench", "--seconds", "nan"], "some seconds"),
    ],
)
def test_a_benchmark_that_cannot_be_is_refused_before_it_begins(
    command: Command, arguments: list[str], said: str
) -> None:
    status, _, err = command(*arguments)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_benchmark_is_a_table_for_each_task(command: Command, write: Write) -> None:
    model = "[model]\nembedding_size = 8\nhidden_sizes = [8]\ndropout = 0.0\n"
    recipe = write("small.toml", f'[data]\ncorpus = "toy"\n{model}[training]\noptimizer = "sgd"\n')
    options = "--subject", "unrolled f32", "--rounds", 1, "--seconds", 0.01
    status, out, err = command("bench", "--recipe", recipe, "--task", "train", "--task", "next-word", *options)
    assert status == 0
    assert f"{recipe} on toy\n" in err
    for head in ("train, tokens/s", "next-word, µs"):
        _, _, table = out.partition(head)
        rows = [line.split() for line in table.splitlines() if line.strip().startswith(("torch f32", "unrolled f32"))]
        assert [row[:2] for row in rows[:2]] == [["torch", "f32"], ["unrolled", "f32"]]
        assert rows[0][5] == "1.00"


def test_a_report_takes_each_run_once_and_damaged_records_do_not_stop_it(
    command: Command, toy_run: Run, tmp_path: Path
) -> None:
    status, _, err = command("report", toy_run.path, toy_run.path)
    assert (status, err) == (2, "unrolled: report takes each run once\n")
    assert command("report", toy_run.path, "--words", -1)[0] == 2
    assert command("report", toy_run.path, "--out", tmp_path)[0] == 2
    metrics = b'[1]\n5\n{}\n{"step": 1}\n{"step": "x", "epoch": 1}\n'
    metrics += b'{"step": 1, "epoch": 1, "train_perplexity": "abc", "sample": 5}\n'
    copy = tmp_path / "copy"
    shutil.copytree(toy_run.path, copy)
    (copy / "metrics.jsonl").write_bytes(metrics + (copy / "metrics.jsonl").read_bytes())
    status, out, err = command("report", copy, "--words", 0)
    assert (status, err) == (0, "")
    assert "Perplexity" in Path(out.strip()).read_text(encoding="utf-8")
