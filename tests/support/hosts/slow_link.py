"""Carries packets of slow or lossy links: a program of its own in the router's network namespace, behind a TUN device.

Kernels do not all have netem. The router sends what belongs to such a link here; a packet comes out after the link's delay,
or never. `python slow_link.py DEVICE` reads one JSON object per line: `{"from": address, "to": address, "delay_s": s, "drop": share}`;
0 and 0 is a link like any other. Packets of one link keep their order. Which are lost follows from a fixed seed.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import sys
import time

# linux/if_tun.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MOST_BYTES = 65_536


def open_tun(name: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return tun


def main(device: str) -> None:
    tun = open_tun(device)
    print("ready", flush=True)
    links: dict[tuple[bytes, bytes], tuple[float, float]] = {}
    waiting: list[tuple[float, int, bytes]] = []
    chance = random.Random(1)
    count, commands = 0, b""
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([tun, sys.stdin.fileno()], [], [], timeout)
        if sys.stdin.fileno() in ready:
            more = os.read(sys.stdin.fileno(), _MOST_BYTES)
            if not more:
                return
            *lines, commands = (commands + more).split(b"\n")
            for line in lines:
                link = json.loads(line)
                ends = socket.inet_aton(link["from"]), socket.inet_aton(link["to"])
                links[ends] = link["delay_s"], link["drop"]
                print("set", flush=True)
        if tun in ready:
            packet = os.read(tun, _MOST_BYTES)
            delay_s, drop = links.get((packet[12:16], packet[16:20]), (0.0, 0.0))  # IPv4: source, destination
            if chance.random() >= drop:
                count += 1
                heapq.heappush(waiting, (time.monotonic() + delay_s, count, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            try:
                os.write(tun, heapq.heappop(waiting)[2])
            except OSError:
                pass  # lost, as packets may be


if __name__ == "__main__":
    main(sys.argv[1])
