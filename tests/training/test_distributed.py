"""Several processes train as one does: started as a user starts them, by torchrun."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import unrolled
from unrolled import UnrolledError, folder
from unrolled.folder import read_tensors
from unrolled.metrics import read_metrics
from unrolled.recipe import load_recipe
from unrolled.training.distributed import ALONE, Ranks
from unrolled.training.start import refuse_shares

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--local-addr",
    "127.0.0.1",
    "--nproc-per-node",
    "2",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
SMALL = {"model.embedding_size": 12, "model.hidden_sizes": "16", "training.precision": "f32"}
ODD = SMALL | {"training.batch_size": 201, "training.num_steps": 9, "training.max_epochs": 1, "model.dropout": 0.0}
MODELS = {
    "sgd, a sparse gradient": {"training.optimizer": "sgd", "training.learning_rate": 0.5},
    "adamw, tied": {"model.tie_weights": True, "model.embedding_size": 16},
    "jordan": {"model.cell": "jordan", "model.embedding_size": 0},
}


def command(out: Path, changes: dict[str, Any]) -> list[str]:
    options = [f"--{name.replace('_', '-')}={str(value).lower()}" for name, value in changes.items()]
    return [*TORCHRUN, "-m", "unrolled", "train", "demo", "--data", "toy", "--out", str(out), *options]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=True, timeout=300)


def environment() -> dict[str, str]:
    return ENVIRONMENT | {"UNROLLED_CACHE": os.environ["UNROLLED_CACHE"]}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path / "model.safetensors")[0]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_two_processes_go_where_one_goes(changes: dict[str, Any], tmp_path: Path) -> None:
    """100 streams and 101."""
    changes = ODD | changes
    done = run(command(tmp_path / "two", changes))
    assert done.stdout.count("best epoch 1") == 1
    assert done.stderr.count("tokens an epoch") == 1
    one = unrolled.train("demo", data="toy", out=tmp_path / "one", changes=changes)
    two = unrolled.load(tmp_path / "two")
    assert two.manifest["hardware"]["processes"] == 2
    assert two.manifest["id"] == one.manifest["id"]
    for name, tensor in weights(one.path).items():
        torch.testing.assert_close(weights(two.path)[name], tensor, rtol=1e-3, atol=2e-5)
    for ours, theirs in zip(read_metrics(one.path), read_metrics(two.path), strict=True):
        for figure in ("train_perplexity", "nll_nats_per_token", "grad_norm", "valid_perplexity"):
            assert theirs.get(figure, 0.0) == pytest.approx(ours.get(figure, 0.0), rel=1e-4)
    assert two.manifest["results"]["test"]["tokens"] == one.manifest["results"]["test"]["tokens"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here")
def test_two_gpus_go_where_one_goes(tmp_path: Path) -> None:
    changes = ODD | MODELS["adamw, tied"] | {"training.device": "cuda"}
    run(command(tmp_path / "two", changes))
    one = unrolled.train("demo", data="toy", out=tmp_path / "one", changes=changes)
    for name, tensor in weights(one.path).items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-4)


TWO_EPOCHS = SMALL | {
    "training.batch_size": 41,
    "training.max_epochs": 2,
    "training.schedule": "decay",
    "model.dropout": 0.2,
}
MANY_EPOCHS = TWO_EPOCHS | {"training.max_epochs": 50}
"""Not over before it is broken off."""


def test_two_that_are_stopped_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Each has its own streams' state, and its own dropout."""
    run(command(tmp_path / "unbroken", TWO_EPOCHS))
    path = tmp_path / "broken"
    with subprocess.Popen(command(path, MANY_EPOCHS), env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "tokens/s" in line)
        process.send_signal(signal.SIGTERM)
        assert f"go on with: torchrun … -m unrolled train --resume --out {path}" in process.stderr.read()
    assert folder.read_manifest(path)["status"] == "stopped"
    point = read_tensors(path / "last/resume.safetensors")[0]
    assert len(point["state.0.0"]) == 41
    assert not torch.equal(point["random.cpu"], point["random.cpu.1"])
    run([*TORCHRUN, "-m", "unrolled", "train", "--resume", "--out", str(path), "--max-epochs", "2"])
    for name, tensor in weights(tmp_path / "unbroken").items():
        assert torch.equal(weights(path)[name], tensor)


def test_where_one_is_killed_nothing_is_lost_and_one_alone_can_go_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with subprocess.Popen(command(path, MANY_EPOCHS), env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "tokens/s" in line)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            process.terminate()
            pytest.skip("this system does not list a process's children")
        os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        told = process.stderr.read()
    assert "another process of this training has ended" in told
    manifest = folder.read_manifest(path)
    assert manifest["status"] == "stopped"
    assert "another process" in manifest["reason"]
    done = unrolled.train(None, out=path, resume=True, changes={"training.max_epochs": 2})
    assert done.manifest["status"] == "done"
    assert [record["epoch"] for record in read_metrics(path) if "valid_perplexity" in record] == [1, 2]


def test_a_program_may_train_twice_and_two_go_on_where_one_stopped(tmp_path: Path) -> None:
    """By `unrolled.train`, from a script that torchrun starts: first one anew, then one that a single process began."""
    begun = TWO_EPOCHS | {"training.max_epochs": 1}
    unrolled.train("demo", data="toy", out=tmp_path / "second", changes=begun)
    script = tmp_path / "script.py"
    script.write_text(
        "import unrolled\n"
        f"unrolled.train('demo', data='toy', out={str(tmp_path / 'first')!r}, changes={begun!r})\n"
        f"run = unrolled.train(out={str(tmp_path / 'second')!r}, resume=True, changes={{'training.max_epochs': 2}})\n"
        "print(run.manifest['status'], flush=True)\n",
        encoding="utf-8",
    )
    assert run([*TORCHRUN, str(script)]).stdout.splitlines() == ["done", "done"]
    first, second = (read_metrics(tmp_path / name) for name in ("first", "second"))
    assert first[-1]["train_perplexity"] == pytest.approx(second[len(first) - 1]["train_perplexity"], rel=0.02)
    assert second[-1]["valid_perplexity"] < first[-1]["valid_perplexity"]
    point = read_tensors(tmp_path / "second/last/resume.safetensors")[0]
    assert not torch.equal(point["random.cpu"], point["random.cpu.1"])


def test_a_kill_within_the_validation_loses_no_step(tmp_path: Path) -> None:
    """torchrun kills 30 s after a signal, however long the validation takes."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, unrolled\n"
        "from unrolled.training import loop\n"
        "loop.validate = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"unrolled.train('demo', data='toy', out={str(tmp_path / 'run')!r}, changes={TWO_EPOCHS!r})\n",
        encoding="utf-8",
    )
    ended = subprocess.run([*TORCHRUN, str(script)], env=environment(), capture_output=True, check=False, timeout=300)
    assert ended.returncode != 0
    position = json.loads(read_tensors(tmp_path / "run/last/resume.safetensors")[1]["position"])
    assert position["epoch"] == 1
    assert position["step"] == position["window"] == (145_044 // 41 - 1) // 20
    done = unrolled.train(None, out=tmp_path / "run", resume=True)
    assert [record["epoch"] for record in read_metrics(done.path) if "valid_perplexity" in record] == [1, 2]


def test_a_signal_to_one_stops_both_at_the_same_step_and_both_save_together(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import math, os, signal, unrolled\n"
        "from unrolled.training import loop, resume\n"
        "resume.SAVING_SHARE, taken, step = math.inf, [], loop.clip_and_step\n"
        "def counted(*rest):\n"
        "    taken.append(0)\n"
        "    if os.environ['RANK'] == '1' and len(taken) == 30:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(*rest)\n"
        "loop.clip_and_step = counted\n"
        f"changes = {TWO_EPOCHS!r} | {{'training.save_every': 7}}\n"
        f"run = unrolled.train('demo', data='toy', out={str(tmp_path / 'run')!r}, changes=changes)\n"
        "print(run.manifest['status'], run.manifest['steps'], flush=True)\n",
        encoding="utf-8",
    )
    assert run([*TORCHRUN, str(script)]).stdout.splitlines() == ["stopped 30", "stopped 30"]


def test_what_cannot_be_shared_out_is_refused() -> None:
    recipe = load_recipe("demo")
    with pytest.raises(UnrolledError, match=r"3 processes take --training.batch-size 3 or more"):
        refuse_shares(recipe.changed({"training.batch_size": 2}), Ranks(0, 3))
    with pytest.raises(UnrolledError, match="standard input reaches one process, not 2; name a file"):
        refuse_shares(recipe.changed({"data.corpus": "-"}), Ranks(1, 2))
    refuse_shares(recipe.changed({"data.corpus": "-", "training.batch_size": 1}), ALONE)


@pytest.mark.parametrize(("batch_size", "world"), [(20, 1), (20, 2), (21, 2), (7, 3), (3, 3), (64, 7)])
def test_every_stream_is_one_ranks(batch_size: int, world: int) -> None:
    shares = [range(batch_size)[Ranks(rank, world).streams(batch_size)] for rank in range(world)]
    assert [stream for share in shares for stream in share] == list(range(batch_size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_that_do_not_find_each_other_say_so(tmp_path: Path) -> None:
    """Something else has the port where they are to meet."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, "-m", "unrolled", "train", "demo", "--data", "toy", "--out", str(tmp_path / "run")],
            env=environment() | place | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "the 2 processes of this training do not find each other" in done.stderr
    assert "Traceback" not in done.stderr
