"""Speed beside PyTorch's own layers: what is timed, and on what."""

import inspect
from pathlib import Path

import pytest
import torch

from unrolled import UnrolledError, subjects
from unrolled.bench import _Worker, bench
from unrolled.data.text import is_at_hand
from unrolled.kernels import build


def test_a_recipe_whose_text_is_not_here_is_timed_on_drawn_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched for it."""
    monkeypatch.delenv("UNROLLED_DATA", raising=False)
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path))
    case = subjects.case("ptb-small")
    assert (case.text, case.vocab_size, len(case.ids)) == ("random ids", 10_000, 1_000_000)
    assert case.ids.max() < 10_000
    assert not list(tmp_path.iterdir())
    assert is_at_hand("stdlib")


def test_subjects_in_bf16_are_left_out_where_the_processor_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "processor_flags", lambda: build.LEVELS["avx2"].flags)
    assert subjects.fastest_precision() == "f32"
    assert {"torch f32", "unrolled f32", "unrolled on PyTorch alone"} <= set(subjects.usual_subjects())
    assert not any(name.endswith("bf16") for name in subjects.usual_subjects())
    monkeypatch.setattr(build, "processor_flags", lambda: build.LEVELS["avx512-bf16"].flags)
    assert subjects.usual_subjects() == tuple(subjects.SUBJECTS)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """What is trained in no time."""
    path = tmp_path / "small.toml"
    path.write_text(
        '[data]\ncorpus = "toy"\n[model]\nembedding_size = 8\nhidden_sizes = [8]\ndropout = 0.0\n'
        '[training]\noptimizer = "sgd"\n'
    )
    return str(path)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("exit 3", "ended with status 3"),
        ("read count; echo $count; exit 4", "ended with status 4"),
        ("while read count; do echo rubbish; done", "was asked for 3 steps and answered 'rubbish'"),
        ("exec >&-; read count; sleep 60", "closed its output"),
    ],
)
def test_a_program_that_does_not_do_what_it_was_asked_for_is_named(recipe: str, program: str, said: str) -> None:
    with pytest.raises(UnrolledError, match=said):
        list(bench(recipe, ("train",), ("torch f32", f'other=sh -c "{program}"'), rounds=2, seconds=0.01))


def test_a_subject_whose_process_is_ended_is_named(recipe: str) -> None:
    with _Worker(recipe, "train", "unrolled f32", 0.01) as worker:
        worker.process.kill()
        worker.process.join()
        with pytest.raises(UnrolledError, match="unrolled f32: its process was ended"):
            worker.seconds_a_step()


@pytest.mark.parametrize("name", ["=yes", "other=", "unrolled f32=yes"])
def test_a_program_has_a_name_of_its_own_and_a_command(recipe: str, name: str) -> None:
    with pytest.raises(UnrolledError, match="it takes NAME=COMMAND, and a name of its own"):
        next(bench(recipe, ("train",), (name,)))


def test_what_pytorchs_layers_cannot_do_is_refused_before_anything_is_timed(recipe: str) -> None:
    tied = Path(recipe).read_text().replace("[model]", "[model]\ntie_weights = true")
    Path(recipe).write_text(tied)
    for name in (recipe, "text8-jordan"):
        with pytest.raises(UnrolledError, match="cannot be timed beside PyTorch's own layers"):
            next(bench(name))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_is_timed_beside_each_other_are_steps_of_the_same_training(recipe: str, optimizer: str) -> None:
    """PyTorch's side learns as the recipe says."""
    Path(recipe).write_text(Path(recipe).read_text().replace('"sgd"', f'"{optimizer}"\nlearning_rate = 0.01'))
    case = subjects.case(recipe)
    torch.manual_seed(1)
    work = subjects.plain("train", case, "f32")
    network, used = (inspect.getclosurevars(work).nonlocals[name] for name in ("network", "optimizer"))
    before = [parameter.clone() for parameter in network.parameters()]
    work(1)
    assert isinstance(used, torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW)
    assert all((one != other).any() for one, other in zip(network.parameters(), before, strict=True))


def test_every_figure_of_a_bench_is_there(recipe: str) -> None:
    said = list[str]()
    answers = list(bench(recipe, ("train",), ("unrolled f32",), rounds=2, seconds=0.05, progress=said.append))
    assert said[-1].startswith(f"{recipe}, train: 2 subjects, rounds: 2; some ")
    assert [answer["subject"] for answer in answers] == ["torch f32", "unrolled f32"]
    for answer in answers:
        assert 0 < answer["minimum"] <= answer["median"] <= answer["maximum"]
        assert answer["ratio_minimum"] <= answer["ratio_to_baseline"] <= answer["ratio_maximum"]
        assert answer["share_of_ceiling"] > 0
        assert answer["ceiling_gflop_per_second"] > 0
        assert answer["peak_memory_mib"] > 0
    assert answers[0]["ratio_to_baseline"] == 1


def test_a_ratio_is_how_many_times_as_fast(recipe: str) -> None:
    for task in ("train", "next-word"):
        one, other = bench(recipe, (task,), ("unrolled f32",), rounds=1, seconds=0.05)
        assert (one["subject"], one["unit"]) == ("torch f32", "tokens/s" if task == "train" else "µs")
        times = other["median"] / one["median"] if task == "train" else one["median"] / other["median"]
        assert other["ratio_to_baseline"] == pytest.approx(times)


def test_a_tokens_operations_are_those_of_its_products(recipe: str) -> None:
    case = subjects.case(recipe)
    products = 4 * 8 * 8 + 4 * 8 * 8 + 8 * case.vocab_size
    assert case.flop_per_token == 6 * products
