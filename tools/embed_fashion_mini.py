"""Make spikedistill/data/embedded: 8,000 + 2,000 images of Fashion-MNIST, 800 and 200 of every class.

    python tools/embed_fashion_mini.py [folder with the four idx files, by default Debian's]

The choice is fixed; the order is that of the original files. Prints the sha256 of the decoded bytes (train images,
train labels, test images, test labels), which tests/data/test_images.py pins.
"""

import hashlib
import lzma
import struct
import sys

from spikedistill.data import hold_out
from spikedistill.data.images import EMBEDDED, IDX, idx_files, read_idx


def main() -> None:
    paths = idx_files("fashion", sys.argv[1] if len(sys.argv) > 1 else None)
    arrays = [read_idx(path, dims) for path, dims in zip(paths, (3, 1, 3, 1), strict=True)]
    digest = hashlib.sha256()
    EMBEDDED.mkdir(exist_ok=True)
    for images, labels, stems, of_class in ((*arrays[:2], IDX[:2], 800), (*arrays[2:], IDX[2:], 200)):
        rows = hold_out(labels.long(), of_class * 10 / len(labels))[1]
        assert labels[rows].bincount().tolist() == [of_class] * 10
        for array, stem in zip((images[rows], labels[rows]), stems, strict=True):
            header = bytes((0, 0, 8, array.dim())) + struct.pack(f">{array.dim()}I", *array.shape)
            data = array.numpy().tobytes()
            digest.update(data)
            # smaller than png sheets and zlib; pb=0, lc=4 suit bytes without alignment
            filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "pb": 0, "lc": 4, "lp": 0}]
            packed = lzma.compress(header + data, filters=filters)
            (EMBEDDED / f"{stem}.xz").write_bytes(packed)
            print(f"{stem}.xz  {list(array.shape)}  {len(packed):,} bytes")
    print("sha256", digest.hexdigest())


if __name__ == "__main__":
    main()
