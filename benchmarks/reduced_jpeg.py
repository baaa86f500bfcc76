"""What decoding JPEG files at a reduced size costs in accuracy.

    python benchmarks/reduced_jpeg.py [--data DATA] [--sides 128,200,256,300,500]

The held-out training images of the shipped model are enlarged, saved as JPEG and decoded twice: by our decoder, which
lets libjpeg reduce them, and in full size with Pillow's bicubic resizing. The table shows the accuracy of the shipped
model on both, in how many answers the class differs, and the mean difference of a pixel.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tabulate import tabulate

from cifar_core.data import add_data_argument, load_dataset
from cifar_core.device import CPU
from cifar_core.evaluate import choose_split
from cifar_core.images import decode
from cifar_core.pixels import IMAGE_SIZE
from cifar_core.predictors import load_predictor, predict_all

EXPORT = Path(__file__).parents[1] / "exported"
SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def enlarged(image: NDArray[np.uint8], side: int, sampling: str) -> bytes:
    """The image as a JPEG file of side x side pixels."""
    content = io.BytesIO()
    large = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    large.save(content, "JPEG", quality=90, subsampling=SAMPLINGS[sampling])
    return content.getvalue()


def decoded_in_full_size(file: bytes) -> NDArray[np.uint8]:
    """The pixels of a square JPEG file, uint8 [32, 32, 3]."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--sides", default="128,200,256,300,500", help="widths of the files; default: %(default)s")
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.data)
    predictor = load_predictor(EXPORT / "model.onnx", CPU)
    held_out, _ = choose_split(predictor, dataset, "validation")
    images, labels = held_out.images.numpy(), held_out.labels.numpy()
    rows = []
    for side in map(int, arguments.sides.split(",")):
        for sampling in SAMPLINGS:
            files = [enlarged(image, side, sampling) for image in images]
            ours = np.stack([decode(file) for file in files])
            full = np.stack([decoded_in_full_size(file) for file in files])
            our_classes, classes = (predict_all(predictor, part)[0].argmax(1) for part in (ours, full))
            rows.append(
                (
                    side,
                    sampling,
                    f"{(our_classes == labels).mean():.2%}",
                    f"{(classes == labels).mean():.2%}",
                    f"{(our_classes != classes).mean():.2%}",
                    f"{np.abs(ours.astype(int) - full).mean():.2f}",
                )
            )
    headers = ("pixels per side", "colours", "reduced", "full size", "other class", "mean difference of a pixel")
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
