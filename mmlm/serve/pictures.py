"""Where the bytes of a request's pictures come from: data URLs, and hosts that were allowed.

A server that fetches whatever address it is given can be made to look into its own network. So
nothing is fetched unless the operator named the host, and then redirects are not followed, and a
body is cut off at the limit.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection
from urllib.parse import unquote_to_bytes

import httpx

from mmlm.errors import InputError
from mmlm.serve.refusals import Refusal, invalid

__all__ = ["Fetcher", "checked_host", "data_of"]

_SHOWN = 80


def data_of(url: str, param: str) -> bytes | None:
    """The bytes in a data URL; None if the address is of another kind.

    Raises:
        Refusal: If it is a data URL, and damaged.
    """
    if url[:5].lower() != "data:":
        return None
    header, comma, content = url[5:].partition(",")
    if not comma:
        raise _bad("The data URL has no comma, so no content.", param)
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(content)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise _bad(
            "The content of the data URL is not base64. Encode the bytes of the picture's file.",
            param,
        ) from None


def checked_host(name: str) -> str:
    """A host that the operator allows, as addresses are compared with it.

    Args:
        name: ``example.org`` for the usual ports, ``example.org:8080`` for another one.

    Raises:
        InputError: If it can be no host.
    """
    try:
        url = httpx.URL(f"http://{name}")
        if url.host and url == httpx.URL(scheme="http", host=url.host, port=url.port, path="/"):
            return _place(url)
    except httpx.InvalidURL:
        pass
    raise InputError(
        f"{name!r} is no host.", advice="Write example.org or example.org:8080, without http://."
    )


def _place(url: httpx.URL) -> str:
    """Host, and the port if it is not the scheme's usual one."""
    return url.host if url.port is None else f"{url.host}:{url.port}"


class Fetcher:
    """Fetches pictures from the hosts that were allowed.

    Args:
        hosts: What `checked_host` made of their names.
        timeout: Longest time without a byte in seconds.
    """

    def __init__(self, hosts: Collection[str], timeout: float) -> None:
        self._hosts = frozenset(hosts)
        # Unpacked, so that what arrives is what is counted.
        headers = {"Accept-Encoding": "identity"}
        self._client = httpx.AsyncClient(timeout=timeout, headers=headers, follow_redirects=False)

    async def __call__(self, address: str, param: str, largest: int) -> bytes:
        """The file behind an address.

        Args:
            address: What the request says.
            param: Where it says so.
            largest: Most bytes of the file.

        Raises:
            Refusal: If its host is not allowed, or there is no file within the limits.
        """
        url = self._checked(address, param)
        body = bytearray()
        try:
            async with self._client.stream("GET", url) as response:
                if response.status_code != 200:
                    raise _bad(f"The host of {_short(address)} says {response.status_code}.", param)
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > largest:
                        raise _bad(f"{_short(address)} is larger than {largest} bytes.", param)
        except httpx.HTTPError as error:
            reason = type(error).__name__
            raise _bad(f"{_short(address)} cannot be fetched ({reason}).", param) from None
        return bytes(body)

    def _checked(self, address: str, param: str) -> httpx.URL:
        """The address as the client library will read it: nobody else's reading counts."""
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise _bad(
                f"{_short(address)} is no address of a picture. Send the picture as a data URL: "
                "data:image/png;base64,...",
                param,
            )
        if _place(url) not in self._hosts or url.userinfo:
            raise Refusal(
                403,
                f"Pictures are not fetched from {_short(_place(url))}. Send the picture as a data "
                "URL; the operator can allow a host with --allow_hosts.",
                param=param,
                code="host_not_allowed",
            )
        return url

    async def close(self) -> None:
        """Ends the connections."""
        await self._client.aclose()


def _bad(message: str, param: str) -> Refusal:
    return invalid(message, param, "invalid_image_url")


def _short(url: str) -> str:
    return repr(url if len(url) <= _SHOWN else url[:_SHOWN] + "...")
