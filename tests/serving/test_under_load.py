"""Many clients while something happens: the version changes, or a replica is killed."""

import collections
import os
import shutil
import signal
import threading
import time

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("httpx2")

import visformer
from tests.serving.fakes import picture
from tests.serving.models import write_small_bundle, write_small_checkpoint
from tests.serving.running import running

PICTURES = [picture(level, (40, 30)) for level in (0, 90, 255)]


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Three bundles whose answers differ."""
    place = tmp_path_factory.mktemp("versions")
    return [
        write_small_bundle(write_small_checkpoint(place / f"{seed}.safetensors", seed), place / f"bundle{seed}")
        for seed in range(3)
    ]


def form(pictures: list[bytes]) -> bytes:
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%s\r\n'
    return b"".join(part % one for one in pictures) + b"--b--\r\n"


def expected(bundle) -> list[list[float]]:
    """The probabilities of all classes of each picture, to four decimals."""
    answers = visformer.Predictor(str(bundle), device="cpu", top_k=5)
    return [rounded(record["predictions"]) for record in answers.predict(PICTURES)]


def rounded(predictions: list[dict]) -> list[float]:
    by_class = sorted(predictions, key=lambda one: one["index"])
    return [round(one["probability"], 3) for one in by_class]


def test_each_answer_is_wholly_of_the_version_that_it_names(versions, tmp_path):
    wanted = {str(number): expected(bundle) for number, bundle in enumerate(versions, start=1)}
    assert len({str(one) for one in wanted.values()}) == 3
    pets = tmp_path / "pets"
    shutil.copytree(versions[0], pets / "1")
    seen: collections.Counter[str] = collections.Counter()
    wrong: list[object] = []
    stop = threading.Event()
    body = form(PICTURES * 4)
    with running(str(pets), "--batch_size", "4") as server:
        server.event("ready")

        def client() -> None:
            while not stop.is_set():
                kind = {"Content-Type": "multipart/form-data; boundary=b"}
                status, answer = server.ask("/predict?top_k=5", body, **kind)
                got = [rounded(record["predictions"]) for record in answer.get("images", ())]
                version = answer.get("version", "none")
                seen[version] += 1
                close = status == 200 and len(got) == 12
                for mine, its in zip(got, wanted.get(version, []) * 4, strict=False):
                    close = close and all(abs(a - b) <= 0.002 for a, b in zip(mine, its, strict=True))
                if not close:
                    wrong.append((status, answer))

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in (2, 3):
            time.sleep(0.5)
            shutil.copytree(versions[number - 1], pets / ".new")
            (pets / ".new").rename(pets / str(number))
            server.process.send_signal(signal.SIGHUP)
            server.event("reloaded", number - 1)
        time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join()
        assert not server.events("fault")
        assert server.stop() == 0
    assert not wrong, wrong[:2]
    assert set(seen) == {"1", "2", "3"} and min(seen.values()) > 3


@pytest.mark.slow
def test_requests_of_a_replica_that_is_killed_are_tried_again_and_answered(versions):
    """Eight clients that try again, as `visformer.Client` does, never see that a replica dies under them."""
    wanted, answered, wrong = expected(versions[0]), [], []
    stop = threading.Event()
    with running(f"pets={versions[0]}", "--replicas", "2") as server:
        server.event("ready", 2)

        def client() -> None:
            with visformer.Client(f"http://127.0.0.1:{server.port}") as asking:
                while not stop.is_set():
                    got = [rounded(record["predictions"]) for record in asking.predict(PICTURES, top_k=5)]
                    answered.append(time.monotonic())
                    if any(
                        abs(a - b) > 0.002 for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True)
                    ):
                        wrong.append(got)

        def guarded() -> None:
            try:
                client()
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=guarded) for _ in range(8)]
        for thread in threads:
            thread.start()
        for death in (1, 2):
            time.sleep(0.5)
            os.kill(server.events("replica_started")[death - 1]["pid"], signal.SIGKILL)
            server.event("replica_died", death)
            server.event("ready", 2 + death)
        time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert len(server.events("replica_started")) == 4
        assert server.stop() == 0
    assert not wrong, wrong[:2]
    assert len(answered) > 50
