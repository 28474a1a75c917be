"""Memory that knows what may be touched: global memory of given tensors, and the shared memory of blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from ptx.values import UNSIGNED, Array


class Fault(RuntimeError):
    """What a GPU may do wrong or right, or would stop at: said as the emulator of the CUDA kernels says it."""


class GlobalMemory:
    """The memories of tensors on the CPU, by their true addresses, and no other."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        storages.pop(0, None)  # of empty tensors
        self._bases = np.array(sorted(storages), dtype=np.uint64)
        sizes = [storages[int(base)].nbytes() for base in self._bases]
        self._bytes = [
            np.frombuffer((ctypes.c_uint8 * size).from_address(int(base)), dtype=np.uint8)
            for base, size in zip(self._bases, sizes, strict=True)
        ]

    def _places(self, addresses: Array, width: int, many: int) -> list[tuple[Array, Array | slice, Array]]:
        """For each memory: its elements, which of the addresses lie in it, and at which element."""
        if (addresses % np.uint64(width * many)).any():
            raise Fault(f"misaligned: {width * many} bytes of global memory")
        which = np.searchsorted(self._bases, addresses, side="right") - 1
        places = []
        for memory in np.unique(which):
            if memory < 0:
                raise Fault("out of bounds: global memory before all tensors")
            chosen = slice(None) if (which == memory).all() else which == memory
            offsets = addresses[chosen] - self._bases[memory]
            if (offsets + np.uint64(width * many) > len(self._bytes[memory])).any():
                raise Fault(f"out of bounds: byte {int(offsets.max())} of {len(self._bytes[memory])} of a tensor")
            elements = self._bytes[memory][: len(self._bytes[memory]) // width * width].view(UNSIGNED[width])
            places.append((elements, chosen, (offsets // np.uint64(width)).astype(np.int64)))
        return places

    def load(self, addresses: Array, width: int, many: int) -> Array:
        """[addresses, many] elements of `width` bytes."""
        values = np.empty((len(addresses), many), UNSIGNED[width])
        for elements, chosen, indices in self._places(addresses, width, many):
            values[chosen] = elements[indices[:, None] + np.arange(many)]
        return values

    def store(self, addresses: Array, values: Array) -> None:
        """Values [addresses, many]; `load`'s opposite."""
        width, many = values.itemsize, values.shape[1]
        for elements, chosen, indices in self._places(addresses, width, many):
            places = indices[:, None] + np.arange(many)
            elements[places] = values[chosen]
            if (elements[places] != values[chosen]).any():
                raise Fault("race: threads write different values to one place of a tensor at once")


@dataclass
class Copy:
    """A `cp.async` under way: its threads, their groups, and what lands where."""

    threads: Array
    groups: Array
    places: Array
    values: Array


@dataclass
class Product:
    """A `wgmma` under way: its first threads, their groups, and the halves of words that it reads."""

    threads: Array
    groups: Array
    places: Array


@dataclass
class SharedMemory:
    """Of all blocks that run together, one behind the other, in units of two bytes, the least that kernels write.

    A unit knows which warp touched it last, and after how many barriers: touched by two warps with no barrier between,
    one of them writing, is a race. It is in a copy from the instruction to the wait, and in a product likewise.
    """

    blocks: int
    bytes: int
    threads: int
    """Of a block."""
    units: Array = field(init=False)
    copies: list[Copy] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)

    def __post_init__(self) -> None:
        size, threads = self.blocks * self.bytes // 2, self.blocks * self.threads
        self.units = np.full(size, 0xFFFF, np.uint16)
        self.barriers = np.zeros(self.blocks, np.int32)
        self.committed_copies, self.committed_products = np.zeros(threads, np.int64), np.zeros(threads, np.int64)
        self._written = np.zeros(size, bool)
        self._unfenced = np.zeros(size, bool)
        self._writer, self._reader = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        self._write_barrier, self._read_barrier = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        self._copied, self._multiplied = np.zeros(size, np.int16), np.zeros(size, np.int16)

    def places(self, threads: Array, addresses: Array, bytes: int) -> Array:
        """[threads, bytes / 2] units at an address of each thread's block."""
        if (addresses % bytes).any():
            raise Fault(f"misaligned: {bytes} bytes of shared memory")
        if (addresses.astype(np.int64) + bytes > self.bytes).any():
            raise Fault(f"out of bounds: byte {int(addresses.max())} of {self.bytes} of shared memory")
        first = (threads // self.threads * self.bytes + addresses.astype(np.int64)) // 2
        return first[:, None] + np.arange(bytes // 2)

    def _now(self, threads: Array) -> tuple[Array, Array]:
        return (threads // 32).astype(np.int32)[:, None], self.barriers[threads // self.threads][:, None]

    def _check_read(self, places: Array, warps: Array, barriers: Array) -> None:
        if self._copied[places].any():
            raise Fault("missing wait: reads what a copy under way will write")
        if not self._written[places].all():
            raise Fault("uninitialised: reads what its block has not written")
        if ((self._write_barrier[places] == barriers) & (self._writer[places] != warps)).any():
            raise Fault("race: reads what another warp wrote, with no barrier between")

    def read(self, threads: Array, places: Array) -> Array:
        """The units at places [threads, ...]."""
        warps, barriers = self._now(threads)
        self._check_read(places, warps, barriers)
        several = (self._read_barrier[places] == barriers) & (self._reader[places] != warps)
        warps, barriers = np.broadcast_to(warps, places.shape), np.broadcast_to(barriers, places.shape)
        self._reader[places], self._read_barrier[places] = warps, barriers
        self._reader[places[several | (self._reader[places] != warps)]] = -2
        return self.units[places]

    def _check_write(self, places: Array, warps: Array, barriers: Array) -> None:
        if self._copied[places].any():
            raise Fault("missing wait: writes what a copy under way will write")
        if self._multiplied[places].any():
            raise Fault("missing wait: writes what a product under way may still read")
        if ((self._read_barrier[places] == barriers) & (self._reader[places] != warps)).any():
            raise Fault("race: writes what another warp read, with no barrier between")
        if ((self._write_barrier[places] == barriers) & (self._writer[places] != warps)).any():
            raise Fault("race: writes what another warp wrote, with no barrier between")

    def _land(self, threads: Array, places: Array, values: Array) -> None:
        warps, barriers = self._now(threads)
        self.units[places], self._written[places] = values, True
        self._writer[places] = np.broadcast_to(warps, places.shape)
        self._write_barrier[places] = np.broadcast_to(barriers, places.shape)

    def write(self, threads: Array, places: Array, values: Array) -> None:
        """Puts the values at places [threads, ...]."""
        self._check_write(places, *self._now(threads))
        self._land(threads, places, values)
        self._unfenced[places] = True
        if (self.units[places] != values).any():
            # Of the lanes of a warp the last one wins: a sum of products differs in its last bit between lanes, where
            # the first addition is fused with each lane's own product.
            warps = np.broadcast_to(self._now(threads)[0], places.shape)
            keys = (places.astype(np.int64) * self.blocks * self.threads + warps).ravel()[::-1]
            last = np.unique(keys, return_index=True)[1]  # the first one from behind
            if (self.units[places].ravel()[::-1] != values.ravel()[::-1])[last].any():
                raise Fault("race: two warps write different values at once")

    def start_copy(self, threads: Array, places: Array, values: Array) -> None:
        """What lands at the wait, and is nobody's till then."""
        self._check_write(places, *self._now(threads))
        self._copied[places] = 1
        self.copies.append(Copy(threads, self.committed_copies[threads], places, values))

    def wait_for_copies(self, threads: Array, pending: int) -> None:
        """All but the last `pending` groups of these threads land."""
        left = []
        for copy in self.copies:
            done = np.isin(copy.threads, threads) & (copy.groups < self.committed_copies[copy.threads] - pending)
            if done.any():
                self._copied[copy.places[done]] = 0
                self._land(copy.threads[done], copy.places[done], copy.values[done])
                self._unfenced[copy.places[done]] = False
            if not done.all():
                left.append(Copy(*(part[~done] for part in (copy.threads, copy.groups, copy.places, copy.values))))
        self.copies = left

    def read_for_product(self, threads: Array, places: Array) -> Array:
        """Units [threads, ...], one thread for each warpgroup; they must stay till `wait_for_products`."""
        _, barriers = self._now(threads)
        barriers = barriers.reshape(-1, *[1] * (places.ndim - 1))
        self._check_read(places, np.full_like(barriers, -1), barriers)
        if self._unfenced[places].any():
            raise Fault("missing fence: wgmma reads what was written with no fence.proxy.async since")
        np.add.at(self._multiplied, places.ravel(), 1)
        self.products.append(Product(threads, self.committed_products[threads], places.reshape(len(threads), -1)))
        return self.units[places]

    def wait_for_products(self, threads: Array, pending: int) -> None:
        """All but the last `pending` groups of these threads have read their operands."""
        left = []
        for product in self.products:
            done = np.isin(product.threads, threads) & (
                product.groups < self.committed_products[product.threads] - pending
            )
            np.subtract.at(self._multiplied, product.places[done].ravel(), 1)
            if not done.all():
                left.append(Product(product.threads[~done], product.groups[~done], product.places[~done]))
        self.products = left

    def fence(self, threads: Array) -> None:
        """What these threads' blocks wrote may be read by products."""
        fenced = self._unfenced.reshape(self.blocks, -1)
        fenced[np.unique(threads // self.threads)] = False

    def barrier(self, blocks: Array) -> None:
        """All threads of these blocks have met."""
        self.barriers[blocks] += 1
