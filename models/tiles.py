"""How much a Triton attention kernel holds at once: sizes that are pinned, because they fix the order of sums."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Tile:
    """Queries and keys that a program holds at once, and how it is laid out on the GPU.

    queries, keys: powers of two, 16 or more. warps: of 32 threads. stages: key or query tiles in flight.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for field in ("queries", "keys"):
            size = getattr(self, field)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{field}={size} is not allowed: a power of two, 16 or more")
        for field, value in (("warps", self.warps), ("stages", self.stages)):
            if value < 1:
                raise ValueError(f"{field}={value} is not allowed: 1 or more")


@dataclass(frozen=True)
class Tiles:
    """The tiles of the forward, the dK/dV and the dQ kernel: they fix the order of sums, so they belong to a run.

    query_gradient: None where the dK/dV kernel adds dQ up with atomics, in an order that nothing fixes.
    """

    forward: Tile
    key_gradient: Tile
    query_gradient: Tile | None

    @property
    def deterministic(self) -> bool:
        """Whether the same numbers give the same bits at every run."""
        return self.query_gradient is not None

    def flat(self) -> list[int]:
        """Four numbers of each kernel, in the order above, as ``torch.library`` operators take them."""
        tiles = self.forward, self.key_gradient, self.query_gradient
        return [size for tile in tiles if tile is not None for size in astuple(tile)]


def pinned_tiles(d_head: int, deterministic: bool = True) -> Tiles:
    """The tiles for a head dim, sized for the registers and shared memory of a Hopper GPU. Never tuned at run time."""
    if not deterministic:
        adding = Tile(64, 128, 8, 2) if d_head <= 128 else Tile(64, 32, 8, 1)
        return replace(pinned_tiles(d_head), key_gradient=adding, query_gradient=None)
    if d_head <= 64:
        return Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2))
    if d_head <= 128:
        return Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2))
    return Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2))
