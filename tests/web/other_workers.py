"""A bus whose other workers answer nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping

from chatstream import Service
from chatstream.bus.local import LocalBus
from chatstream.bus.messages import Claim, Enquiry, Page, Request, Worker
from chatstream.errors import Unconfirmed


class OtherWorkers(LocalBus):
    """A bus to workers that answer neither a cancel nor a claim."""

    def __init__(self, service: Service, error: Exception) -> None:
        super().__init__(service._neighbours.receive)
        self.error = error
        service._neighbours.bus, service._neighbours.joined = self, os.getpid()

    def claim(self, claim: Claim, *, reject: bool, limit: int | None = None) -> bool:
        raise self.error

    def _others(self) -> list[Worker]:
        if isinstance(self.error, Unconfirmed):
            return [Worker("silent", 1, "host")]
        raise self.error

    def _pages(self, enquiries: Mapping[Worker, Enquiry]) -> dict[Worker, Page | None]:
        return dict.fromkeys(enquiries)

    def check(self) -> None:
        raise self.error

    def cancel_elsewhere(self, request: Request) -> bool:
        raise self.error
