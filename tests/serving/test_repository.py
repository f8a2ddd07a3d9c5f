"""Versions come and go without a request that notices."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.serving.fakes import Fake, picture, write_version
from tests.serving.test_http import infer, until
from visformer.errors import RunError, UsageError
from visformer.serving.refusals import Refusal
from visformer.serving.repository import Repository
from visformer.serving.settings import Settings


def states(repository: Repository) -> dict[str, str]:
    return {f"{row['name']}/{row['version']}": row["state"] for row in repository.index()}


def test_versions_are_switched_under_load_and_each_answer_is_of_one(serving, models):
    """Version n adds 10 n to the logits; an answer that mixed two, or lied about which it was of, would show."""
    seen, failures = [], []

    async def client_loop(client, stop):
        while not stop.is_set():
            answer = await infer(client, [picture(0)] * 3, outputs=[{"name": "logits"}])
            if answer.status_code != 200:
                failures.append(answer.text)
                continue
            version = int(answer.json()["model_version"])
            (logits,) = answer.json()["outputs"]
            expected = 10 * version if version > 1 else 0
            if logits["data"] != [expected, expected + 1, expected + 2] * 3:
                failures.append(answer.text)
            seen.append(version)

    async def main():
        async with serving(batch_size=4) as (client, service):
            stop = asyncio.Event()
            loops = [asyncio.ensure_future(client_loop(client, stop)) for _ in range(6)]
            for number in range(2, 7):
                write_version(models / "pets", number, str(10 * number))
                assert await service.repository.reload() == []
                await until(lambda number=number: seen and seen[-1] == number)
            stop.set()
            await asyncio.gather(*loops)
            await until(lambda: "UNLOADING" not in states(service.repository).values())
            return states(service.repository)

    final = asyncio.run(main())
    assert not failures
    assert set(seen) == {1, 2, 3, 4, 5, 6}
    assert final["pets/6"] == "READY"
    assert list(final.values()).count("READY") == 1


def test_the_old_version_answers_those_that_have_it(fake, models):
    async def main():
        repository = Repository([str(models)], Settings(), loader=fake)
        await repository.start()
        with repository.lease("pets") as old:
            write_version(models / "pets", 2, "10")
            await repository.reload()
            assert repository.lease("pets").version == "2"
            await asyncio.sleep(0)
            while_leased = states(repository)["pets/1"]
            (future,) = old.batcher.submit([np.zeros((3, 8, 8), dtype=np.float32)])
            assert (await future).logits.tolist() == [0, 1, 2]
        await asyncio.sleep(0.01)
        return while_leased, states(repository)

    while_leased, afterwards = asyncio.run(main())
    assert while_leased == "UNLOADING"
    assert afterwards == {"pets/1": "UNAVAILABLE", "pets/2": "READY"}


def test_a_version_that_can_not_be_loaded_changes_nothing(fake, models):
    async def main():
        repository = Repository([str(models)], Settings(), loader=fake)
        await repository.start()
        write_version(models / "pets", 2, "broken")
        problems = await repository.reload()
        with pytest.raises(Refusal) as refused:
            await repository.load("pets")
        failed = states(repository)
        write_version(models / "pets", 3, "30")
        assert await repository.reload() == []
        return problems, refused.value, failed, repository.lease("pets").version, repository.ready

    problems, refused, failed, version, ready = asyncio.run(main())
    assert len(problems) == 1
    assert problems[0].endswith("broken")
    assert refused.status == 400
    assert "/" not in refused.message
    assert failed == {"pets/1": "READY", "pets/2": "UNAVAILABLE"}
    assert (version, ready) == ("3", True)


def test_an_error_that_no_one_foresaw_changes_nothing_either(fake, models, capsys):
    async def main():
        repository = Repository([str(models)], Settings(), loader=fake)
        await repository.start()
        write_version(models / "pets", 2, "strange")
        problems = await repository.reload()
        return problems, states(repository), repository.lease("pets").version

    problems, known, version = asyncio.run(main())
    assert "something that no one foresaw" in problems[0]
    assert known == {"pets/1": "READY", "pets/2": "UNAVAILABLE"}
    assert version == "1"
    assert "KeyError" in capsys.readouterr().err


def test_every_version_can_be_asked_for(fake, models):
    async def main():
        write_version(models / "pets", 2, "10")
        repository = Repository([str(models)], Settings(versions="all"), loader=fake)
        await repository.start()
        versions = repository.versions("pets"), repository.lease("pets").version, repository.lease("pets", "1").version
        with pytest.raises(Refusal, match="no version 3"):
            repository.lease("pets", "3")
        return versions

    assert asyncio.run(main()) == (["1", "2"], "2", "1")


def test_unloaded_and_loaded_again_even_while_it_is_used(fake, models):
    async def main():
        repository = Repository([str(models)], Settings(), loader=fake)
        await repository.start()
        with repository.lease("pets"):
            await repository.unload("pets")
            with pytest.raises(Refusal) as refused:
                repository.lease("pets")
            assert await repository.reload() == []  # an unloaded model stays so
            unloaded = states(repository)
            await repository.load("pets")
            with repository.lease("pets") as again:
                (future,) = again.batcher.submit([np.zeros((3, 8, 8), dtype=np.float32)])
                await future
        return refused.value.status, unloaded, states(repository)

    status, unloaded, loaded = asyncio.run(main())
    assert (status, unloaded, loaded) == (404, {"pets/1": "UNLOADING"}, {"pets/1": "READY"})


def test_one_file_that_is_replaced_becomes_the_next_version(fake, tmp_path):
    async def main():
        path = tmp_path / "birds.safetensors"
        path.write_text("0")
        repository = Repository([str(path)], Settings(), loader=fake)
        await repository.start()
        await repository.reload()
        before = repository.lease("").version
        path.write_text("100")
        await repository.reload()
        return before, repository.lease("").version, repository.versions("birds")

    assert asyncio.run(main()) == ("1", "2", ["2"])


def test_models_appear_and_disappear(fake, models):
    async def main():
        repository = Repository([str(models)], Settings(), loader=fake)
        await repository.start()
        write_version(models / "birds", 1, "5")
        await repository.reload()
        both = repository.names()
        with pytest.raises(Refusal, match="name one of the models: pets, birds"):
            repository.lease("")
        (models / "pets").rename(models / ".pets")
        await repository.reload()
        return both, repository.names()

    assert asyncio.run(main()) == (["pets", "birds"], ["birds"])


def test_what_has_vanished_is_not_loaded_and_not_let_go(fake, models):
    async def main():
        write_version(models / "birds", 1, "5")
        repository = Repository([str(models)], Settings(), loader=fake)
        await repository.start()
        (models / "pets").rename(models / ".pets")
        with pytest.raises(Refusal, match="failed to load pets: no version of it is there") as refused:
            await repository.load("pets")
        with pytest.raises(Refusal) as unknown:
            await repository.load("cats")
        return refused.value.status, unknown.value.status, repository.lease("pets").version

    assert asyncio.run(main()) == (400, 404, "1")


def test_while_loading_it_says_so(models):
    gate = threading.Event()

    class Slow(Fake):
        def __call__(self, source, settings):
            assert gate.wait(20)
            return super().__call__(source, settings)

    async def main():
        repository = Repository([str(models)], Settings(), loader=Slow())
        starting = asyncio.ensure_future(repository.start())
        await until(lambda: states(repository).get("pets/1") == "LOADING")
        with pytest.raises(Refusal) as refused:
            repository.lease("pets")
        ready = repository.ready
        gate.set()
        await starting
        return refused.value, ready, repository.ready

    refused, before, afterwards = asyncio.run(main())
    assert (refused.status, refused.headers) == (503, {"Retry-After": "1"})
    assert (before, afterwards) == (False, True)


def test_a_start_that_fails_says_why(fake, tmp_path: Path):
    write_version(tmp_path / "pets", 1, "broken")
    with pytest.raises(RunError, match="broken"):
        asyncio.run(Repository([str(tmp_path / "pets")], Settings(), loader=fake).start())
    (tmp_path / "cats" / "1").mkdir(parents=True)
    with pytest.raises(UsageError, match="must hold a bundle"):
        Repository([str(tmp_path / "cats")], Settings(), loader=fake)
