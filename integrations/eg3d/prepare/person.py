"""Who the album is of, where photos show several faces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from convlora.errors import AlbumError
from convlora.integrations.eg3d.prepare.landmarks import Face

#: Two faces are one person's if the cosine of their embeddings reaches this. Verification thresholds of ArcFace models
#: at a false match rate of 1e-3 to 1e-4 lie between 0.2 and 0.4; other encoders need another value.
SAME_PERSON = 0.3
#: Without an encoder, a face is the main one if its box has this many times the area of every other.
LARGER = 2.5


def largest_face(faces: Sequence[Face]) -> int | None:
    """The index of the one face, or of the one that is LARGER than every other; None if there is no such face."""
    order = sorted(range(len(faces)), key=lambda at: -faces[at].area)
    if len(order) > 1 and faces[order[0]].area < LARGER * faces[order[1]].area:
        return None
    return order[0] if order else None


def main_person(
    embeddings: Sequence[NDArray[np.floating]], areas: Sequence[Sequence[float]], threshold: float = SAME_PERSON
) -> list[int | None]:
    """For each photo the index of the main person's face, or None where that person does not appear.

    The main person is the centre of the largest group of faces with a cosine of at least `threshold` to it, at most
    one face per photo; then the group's mean takes the centre's place and is asked once more. Of two people with
    equally many photos the one whose faces are larger is taken.

    Args:
        embeddings: for each photo (K, D) unit vectors of its K faces; K may be 0.
        areas: for each photo the K areas of their boxes.

    Raises `AlbumError`: two people appear equally often and equally large.
    """
    counts = [len(rows) for rows in embeddings]
    if not sum(counts):
        return [None] * len(counts)
    every = np.concatenate([np.asarray(rows, np.float64) for rows in embeddings if len(rows)])
    area = np.array([value for row in areas for value in row])
    photo = np.repeat(np.arange(len(counts)), counts)
    groups = [_group(every @ centre, photo, threshold) for centre in every]
    size = np.array([len(group) for group in groups])
    leaders = np.flatnonzero(size == size.max())
    scale = np.array([np.median(area[groups[at]]) for at in leaders])
    best = int(leaders[scale.argmax()])
    rivals = [at for at in leaders if not set(groups[at]) & set(groups[best])]
    if rivals and scale.max() < 1.2 * max(scale[list(leaders).index(at)] for at in rivals):
        raise AlbumError(
            f"two people appear in {size.max()} photos each, equally large: leave one out, by cropping photos or by "
            "giving only photos of one person"
        )
    mean = every[groups[best]].mean(0)
    chosen = _group(every @ (mean / np.linalg.norm(mean)), photo, threshold)
    starts = np.concatenate([[0], np.cumsum(counts)])
    answer: list[int | None] = [None] * len(counts)
    for at in chosen:
        answer[photo[at]] = int(at - starts[photo[at]])
    return answer


def _group(cosines: NDArray[np.float64], photo: NDArray[np.int64], threshold: float) -> list[int]:
    """Of each photo its most similar face, where it reaches the threshold."""
    order = np.argsort(-cosines, kind="stable")
    order = order[cosines[order] >= threshold]
    _, first = np.unique(photo[order], return_index=True)
    return [int(at) for at in order[first]]
