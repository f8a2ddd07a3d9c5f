"""The soak of tests/soak/serving.py in short, and its rules: what it would not let pass."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tests.serving.running import running
from tests.soak import serving as soak

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("part", [("--requests", "800", "--malformed", "0"), ("--requests", "0", "--malformed", "150")])
def test_a_few_hundred_requests_leave_the_server_as_it_was(part):
    ended = subprocess.run(
        [sys.executable, "-m", "tests.soak.serving", *part], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "every rule was kept"
    assert "resident memory" in ended.stdout
    assert "200" in ended.stdout if part[1] != "0" else "400" in ended.stdout


def test_a_rise_is_told_from_noise():
    flat = [(number, 100 + (-1) ** number * 30) for number in range(100)]
    assert abs(soak.risen(flat)) < 5
    rising = [(number, 7 * number) for number in range(101)]
    assert soak.risen(rising) == pytest.approx(7 * 80)
    warming = [(number, min(number, 15) * 1000) for number in range(101)]
    assert soak.risen(warming) == pytest.approx(0)


def test_every_rule_can_be_broken(bundle):
    """A server that is gone from, so to say: it got 40 MiB larger, kept files and threads, and said 500."""
    with running(str(bundle), "--drain_s", "0") as server:
        server.event("ready")

        def work(watch: soak.Watch) -> None:
            base = server.resident()
            watch.memory = [(number, base + number * 2**20) for number in range(101)]
            watch.settled = (-10, -10)
            watch.bad.append("valid requests: {500: 1}")
            watch.statuses["500"] += 1

        broken = soak.held(server, soak.ENOUGH, work, patience_s=0)
    assert len(broken) == 4
    for rule, words in zip(broken, ("{500: 1}", "memory is not flat", "threads:", "open files:"), strict=True):
        assert words in rule


def test_malformed_requests_are_the_same_each_time_and_of_every_kind():
    once, again = soak.bad_requests(3), soak.bad_requests(3)
    assert once == again and len(once) > 60
    chance = soak.random.Random(1)
    good = soak.good_requests(0)
    assert sum(soak.damaged(one, chance) != one for one in good) == len(good)
    assert len(soak.bomb_picture(500)) < 5000
