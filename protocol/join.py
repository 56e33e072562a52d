"""The join string: `cw1:HOST:PORT:RUNID`, all that a volunteer needs to find a run and to know that it is the one."""

import re
from dataclasses import dataclass

from protocol.documents import RunId
from protocol.errors import JoinStringInvalid

_FORM = re.compile(
    r"cw1:(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9.-]{1,253}):(?P<port>[0-9]{1,5}):(?P<run>[0-9a-f]{64})"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinString:
    """Where a coordinator answers, and the id of the run that it must prove to speak for."""

    host: str
    port: int
    run: RunId

    @classmethod
    def parse(cls, text: str) -> "JoinString":
        """Read a join string; raise `JoinStringInvalid` with what is wrong with it."""
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise JoinStringInvalid(f"{text[:100]!r} is not a join string; it has the form cw1:HOST:PORT:RUNID.")
        port = int(match["port"])
        if not 1 <= port <= 65_535:
            raise JoinStringInvalid(f"Port {port} in the join string is not between 1 and 65535.")
        return cls(host=match["host"], port=port, run=RunId(match["run"]))

    def __str__(self) -> str:
        return f"cw1:{self.host}:{self.port}:{self.run}"

    @property
    def target(self) -> str:
        """The gRPC target, `HOST:PORT`."""
        return f"{self.host}:{self.port}"
