"""The log: a line for each event, in order."""

import asyncio
import json

from visformer.serving import log


def test_lines_of_a_turn_are_written_together_and_in_order(capsys, monkeypatch):
    async def main():
        log.event_soon("first")
        log.event_soon("second", n=1)
        before = capsys.readouterr().err
        await asyncio.sleep(0)
        together = capsys.readouterr().err
        log.event_soon("third")
        log.event("fourth")
        return before, together, capsys.readouterr().err

    before, together, at_once = asyncio.run(main())
    assert before == ""
    assert [json.loads(line)["event"] for line in together.splitlines()] == ["first", "second"]
    assert [json.loads(line)["event"] for line in at_once.splitlines()] == ["third", "fourth"]
