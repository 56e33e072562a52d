"""A connection is believed only with the run's own papers for its very certificate."""

import asyncio
from pathlib import Path

import pytest

from protocol.canonical import sha256_hex
from protocol.errors import CommonweightError, DelegationInvalid, EndpointUntrusted, Unreachable
from protocol.join import JoinString
from protocol.keys import PrivateKey
from tests.worker.certificates import self_signed
from tests.worker.small_run import HOUR_MS, SmallRun, now_ms
from worker.link import fetch_certificate, open_link


@pytest.mark.parametrize("authority", [None, True, False])
def test_any_kind_of_self_signed_certificate_serves(tmp_path: Path, authority: bool | None) -> None:
    async def scenario() -> None:
        run = SmallRun(tmp_path)
        run.key_pem, run.certificate_pem, run.certificate_sha256 = self_signed(authority=authority)
        async with run:
            assert sha256_hex(await fetch_certificate("127.0.0.1", run.port)) == run.certificate_sha256
            link = await open_link(run.join, now_ms=now_ms())
            assert link.trust.config == run.config
            await link.channel.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("wrong", ["coordinator key", "root key", "config"])
def test_papers_that_do_not_fit_together_are_not_believed(tmp_path: Path, wrong: str) -> None:
    async def scenario() -> None:
        async with SmallRun(tmp_path) as run:
            join = run.join
            if wrong == "root key":
                run.root_key = PrivateKey.generate()
            elif wrong == "coordinator key":
                true_key, true_delegation = run.key, run._delegation()
                run._delegation = lambda: true_delegation  # type: ignore[method-assign]
                run.key = PrivateKey.generate()
                assert run.key is not true_key
            else:
                run.root_key, true_root = PrivateKey.generate(), run.root_key
                papers = await run.GetEndpoint(None, None)
                run.root_key = true_root
                reply = await run.GetEndpoint(None, None)

                async def mixed(request: object, context: object) -> object:
                    from dataclasses import replace

                    return replace(reply, config_envelope=papers.config_envelope)

                await run.stop()
                run.GetEndpoint = mixed  # type: ignore[assignment]
                await run.start()
            with pytest.raises(EndpointUntrusted):
                await open_link(join, now_ms=now_ms())

    asyncio.run(scenario())


@pytest.mark.parametrize(("hours", "error"), [(0, None), (3, DelegationInvalid)])
def test_papers_that_have_expired_are_not_believed(
    tmp_path: Path, hours: int, error: type[CommonweightError] | None
) -> None:
    async def scenario() -> None:
        async with SmallRun(tmp_path) as run:
            link = await open_link(run.join, now_ms=now_ms() + hours * HOUR_MS)
            await link.channel.close()

    if error is None:
        asyncio.run(scenario())
    else:
        with pytest.raises(error):
            asyncio.run(scenario())


def test_a_server_that_does_not_speak_tls_is_unreachable() -> None:
    async def scenario() -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example.org ESMTP\r\n")
            writer.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            run = PrivateKey.generate().public.key_id
            with pytest.raises(Unreachable):
                await open_link(JoinString.parse(f"cw1:127.0.0.1:{port}:{run}"), now_ms=now_ms())

    asyncio.run(scenario())
