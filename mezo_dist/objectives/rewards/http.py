"""Services that judge texts over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, final

from mezo_dist.config.reward import RewardConfig
from mezo_dist.distributed.bounded import bounded
from mezo_dist.errors import UserError
from mezo_dist.objectives.rewards.refused import NoReward, TooSlow, checked_number

LONGEST_ANSWER = 65_536
"""Bytes."""
TRY_AGAIN = (429, 500, 502, 503, 504)
"""Statuses of a service that may answer later."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The token is for the address that the config names, and for no other."""

    def redirect_request(self, *_: object) -> None:
        return None


@final
class Service:
    """An address that texts are posted to.

    Args:
        config: with ``http``.

    Raises:
        UserError: the environment variable for the token is not set.
    """

    def __init__(self, config: RewardConfig) -> None:
        assert config.http is not None
        self._url, self._timeout_s, self._retries = config.http, config.timeout_s, config.retries
        self._headers = {"Content-Type": "application/json"}
        if config.http_token is not None:
            token = os.environ.get(config.http_token, "").strip()
            if not token:
                raise UserError(f"reward.http_token: the environment variable {config.http_token} is not set")
            if not (token.isascii() and token.isprintable()):  # said without its value
                raise UserError(f"reward.http_token: {config.http_token} holds more than printable ASCII characters")
            self._headers["Authorization"] = f"Bearer {token}"
        proxies = urllib.request.ProxyHandler(None if config.http_proxy else {})
        self._opener = urllib.request.build_opener(_NoRedirects, proxies)

    def ask(self, row: Mapping[str, Any], text: str) -> float:
        """The service's number for a text.

        Raises:
            NoReward: it gave none, asked ``retries`` times again.
        """
        data = json.dumps({"row": row, "text": text}, default=str).encode()
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(0.1 * 2**attempt, self._timeout_s))
            try:
                # The opener's own limit is for each read: a server that trickles never reaches it.
                return bounded(lambda: self._number(data), self._timeout_s)
            except TimeoutError:
                raise TooSlow(f"reward.http: {self._url} gave no answer within {self._timeout_s:g} s") from None
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"status {error.code}"
                if error.code not in TRY_AGAIN:
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, or no answer in time
                reason = str(error) or type(error).__name__
        raise NoReward(f"reward.http: {self._url} gave no answer ({reason})")

    def _number(self, data: bytes) -> float:
        request = urllib.request.Request(self._url, data, self._headers, method="POST")
        with self._opener.open(request, timeout=self._timeout_s) as response:
            body = response.read(LONGEST_ANSWER + 1)
        try:
            answer = json.loads(body.decode())
        except (ValueError, RecursionError) as error:
            raise NoReward(f"reward.http: the answer is not JSON ({str(error)[:200]})") from error
        return checked_number(answer.get("reward") if isinstance(answer, dict) else answer, "reward.http")
