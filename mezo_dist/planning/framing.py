"""Framing: what crosses a link beside the contents of messages, where gloo carries them over TCP.

gloo cuts a collective into messages, and each message into three frames with a header of 48 bytes each: the sender
says that it wants to send, the receiver that it is ready, and the contents follow the third header
(``gloo/transport/tcp/pair.cc``: ``NOTIFY_SEND_READY``, ``NOTIFY_RECV_READY``, ``SEND_UNBOUND_BUFFER``). Each frame is
a TCP segment of its own at least (``TCP_NODELAY``), with the headers of Ethernet, IPv4 and TCP. In a ring every rank
is the sender of a message to one neighbour while it is the receiver of one from the other, so that each direction of
a link carries all three frames of every message, once.

Numbers of messages are those of gloo's ring algorithms (``gloo/allreduce.cc``, ``gloo/allgather.cc``), which cut what
a rank sends to its neighbour in two halves, so that one is under way while the other is worked on. All of it was held
against the frames that a virtual host's network card sends and receives: with 2, 4 and 8 hosts the frames are exactly
these, and the bytes come out within 4 % (`examples/scaling_study/README.md`). On a link of 1 Mbit/s between two hosts
a quarter of the frames share a packet.

Assumptions: IPv4 with time stamps, packets of 1,500 bytes, no TLS, nothing lost; a receiver acknowledges every second
full segment (RFC 5681), and some messages in a packet of its own (`LONE_ACKS`; the others ride on a frame that goes
the same way, which is more often so where both neighbours of a ring are one, and share a connection).

NCCL has no such messages: its framing is not counted. Over sockets the headers of full segments are 5 to 7 % of the
contents (`SEGMENT_HEADERS` for each `SEGMENT_BYTES`), over InfiniBand 1 to 2 %.
"""

from __future__ import annotations

import math

GLOO_HEADER = 48
"""Bytes of the header of a frame (six words)."""
GLOO_FRAMES = 3
"""Frames of a message, which all have a header."""
GLOO_SEGMENT = 2**20
"""The most bytes that gloo's all-reduce sends in one message."""
SEGMENT_HEADERS = 14 + 20 + 32
"""Bytes of Ethernet, IPv4 and TCP (with time stamps) in a packet, as network cards count them."""
SEGMENT_BYTES = 1500 - 20 - 32
"""The most bytes of a TCP stream in a packet."""
LONE_ACKS, LONE_ACKS_OF_TWO = 0.75, 0.25
"""Packets for each message that carry nothing but an acknowledgement, among three or more ranks and between two.
Measured."""


def messages_of_reduce(size: int, ranks: int) -> float:
    """Messages that a rank sends in one all-reduce, as a mean over ranks.

    The ring cuts ``size`` into two parts for each rank, or more if they would be too large, of whole words of 8
    bytes; of few words some parts are empty, and are not sent. Every part goes round all ranks but one to be added
    up, and again to be told.

    Args:
        size: bytes of the array that is added up.
        ranks: that take part.
    """
    if ranks == 1 or size == 0:
        return 0.0
    parts = ranks * max(2, math.ceil(math.ceil(size / GLOO_SEGMENT) / ranks))
    part = 8 * math.ceil(math.ceil(size / parts) / 8)
    return 2 * math.ceil(size / part) * (ranks - 1) / ranks


def messages_of_gather(ranks: int) -> float:
    """Messages that a rank sends in one all-gather: two halves of every other rank's share."""
    return 2.0 * (ranks - 1)


def framing_of(messages: float, contents: float, ranks: int) -> int:
    """Bytes beside the contents that a rank puts on the link to its neighbour, acknowledgements to the other one among
    them.

    Args:
        messages: that it sends; as many come to it.
        contents: bytes that these carry together, spread evenly.
        ranks: that take part.
    """
    if not messages:
        return 0
    segments = math.ceil((GLOO_HEADER + contents / messages) / SEGMENT_BYTES)
    acks = (LONE_ACKS if ranks > 2 else LONE_ACKS_OF_TWO) + (segments - 1) / 2
    packets = GLOO_FRAMES - 1 + segments + acks
    return round(messages * (GLOO_FRAMES * GLOO_HEADER + packets * SEGMENT_HEADERS))
