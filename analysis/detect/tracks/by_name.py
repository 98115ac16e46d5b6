"""Tracks by the names of their files in ``conf/track``, and in that folder of a configuration of one's own."""

from __future__ import annotations

from foreshock.analysis.detect.tracks.base import Charted, Raw, Track
from foreshock.analysis.runs.conf import Conf

GROUP = "track"


def tracks_of(conf: Conf) -> dict[str, Track]:
    """Every track by name, in the order of boards: the primary one, then those that take files, then charted ones.

    Raises ValueError, in one line, for a file that makes no track, and where two of them are primary.
    """
    made: list[Track] = [conf.made(GROUP, name, (Charted, Raw)) for name in conf.files(GROUP)]
    tracks = sorted(made, key=lambda t: (not t.primary, not t.takes_files, not isinstance(t, Charted), t.name))
    primary = [track.name for track in made if track.primary]
    if len(primary) > 1:
        raise ValueError(f"track={primary[1]} is not allowed: {primary[0]} is primary already, and one can be")
    return {track.name: track for track in tracks}


TRACKS = tracks_of(Conf())
"""The project's own."""
