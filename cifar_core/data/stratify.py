"""Splitting the images of a folder into a training and a test set, the same way on every machine."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cifar_core.data.errors import OTHER_DATA, DataError

TEST_SHARE = 0.2
"""Share of each class that becomes the test set."""

Labelled = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
"""Images, uint8 [N, 32, 32, 3], and their labels, int64 [N]."""


@dataclass(frozen=True)
class StratifiedSplit:
    """The two sets, and remarks on duplicates that a summary should show."""

    train: Labelled
    test: Labelled
    notes: list[str]


def stratified_split(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], classes: list[str], name: str
) -> StratifiedSplit:
    """Puts about a fifth of each class into the test set.

    The SHA-256 of the pixels decides, so the split depends neither on file names nor on a random generator, and equal
    images are on the same side, even if they are in two classes.

    Args:
        images: uint8 [N, 32, 32, 3].
        labels: int64 [N].
        classes: class names.
        name: name of the data for error messages.

    Raises:
        DataError: A class does not have an image for each set.
    """
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    sides: dict[str, bool] = {}
    for label in range(len(classes)):
        copies: dict[str, int] = {}
        for row in np.flatnonzero(labels == label):
            copies[digests[row]] = copies.get(digests[row], 0) + 1
        _assign(copies, sides)
    in_test = np.asarray([sides[digest] for digest in digests])
    for label, class_name in enumerate(classes):
        if len(set(in_test[labels == label].tolist())) < 2:
            missing = "training" if in_test[labels == label].all() else "test"
            raise DataError(
                f"{name}: the class {class_name} has no image for the {missing} set, because it has fewer than 2 "
                f"different images that no other class has; add images{OTHER_DATA}"
            )
    return StratifiedSplit(
        (images[~in_test], labels[~in_test]), (images[in_test], labels[in_test]), _notes(digests, labels)
    )


def _assign(copies: dict[str, int], sides: dict[str, bool]) -> None:
    """Chooses a side (True: test) for each image of a class that has none yet.

    Args:
        copies: how often each image of the class occurs, by digest.
        sides: the choices for earlier classes; extended.
    """
    wanted = max(1, round(TEST_SHARE * sum(copies.values())))
    in_test = sum(count for digest, count in copies.items() if sides.get(digest))
    new = sorted(digest for digest in copies if digest not in sides)
    for digest in new:
        sides[digest] = in_test + copies[digest] <= wanted
        in_test += copies[digest] if sides[digest] else 0
    if not in_test and len(new) > 1:  # each image has more copies than the share allows
        sides[min(new, key=lambda digest: (copies[digest], digest))] = True


def _notes(digests: list[str], labels: npt.NDArray[np.int64]) -> list[str]:
    by_digest: dict[str, set[int]] = {}
    for digest, label in zip(digests, labels.tolist(), strict=True):
        by_digest.setdefault(digest, set()).add(label)
    notes = [f"{TEST_SHARE:.0%} of each class became the test set, chosen by the content of the images"]
    if len(by_digest) < len(digests):
        notes.append(f"{len(digests) - len(by_digest):,} images are copies of others; copies are in the same set")
    in_two = sum(len(found) > 1 for found in by_digest.values())
    if in_two:
        notes.append(f"{in_two:,} images are in more than one class, so no model can classify all of them correctly")
    return notes
