"""`effnet-pack`: write a data set again in fewer bytes, so that reading it keeps up with a GPU."""

import shlex
import time

from effnet_repro.cli.kit import UsageError, choice, program, user_path, whole_number
from effnet_repro.cli.options import data_arguments, data_dir_of
from effnet_repro.data import open_data
from effnet_repro.data.packed import FORMS, IN_A_PART, Packing, pack
from effnet_repro.messages import byte_size
from effnet_repro.runs.preflight import check_folder

#: What the line that comes next trains.
SOME_CASE = "B0-G16-LN_PN-Half_16IPU_2x8"


def _pack_arguments(parser):
    parser.add_argument(
        "target",
        type=user_path,
        metavar="TARGET",
        help="folder to write, a new one or begun before",
    )
    data_arguments(parser, decodes=False)
    parser.add_argument(
        "--form",
        type=choice("form", FORMS),
        default="jpeg",
        metavar="NAME",
        help="jpeg (default): TFRecords; raw: pixels in .npy files, which need no decoding and five times the room",
    )
    parser.add_argument(
        "--short-side",
        type=whole_number,
        default=256,
        metavar="N",
        help="pixels that larger images are shrunk to; 0 = images stay as they are; default: 256",
    )
    parser.add_argument(
        "--quality", type=whole_number, default=90, metavar="N", help="of JPEGs; default: 90"
    )
    parser.add_argument(
        "--workers",
        type=whole_number,
        metavar="N",
        help="processes that write; default: one a core",
    )
    parser.add_argument(
        "--images-in-a-file",
        type=whole_number,
        default=IN_A_PART,
        metavar="N",
        help=f"default: {IN_A_PART:,}",
    )


@program(
    "pack",
    _pack_arguments,
    """
    effnet-pack /fast/imagenet256 --data-dir /data/imagenet
    effnet-pack /fast/imagenet256raw --data-dir /data/imagenet --form raw --workers 16
    effnet-train B0-G16-LN_PN-Half_16IPU_2x8 --data-dir /fast/imagenet256
    """,
)
def pack_command(args):
    "Write a data set with smaller images; the same command again goes on where it was interrupted."
    if args.workers is not None and args.workers < 1:
        raise UsageError("--workers must be at least 1.")
    if args.short_side < 0:
        raise UsageError("--short-side must be at least 0.")
    how = Packing(args.form, args.short_side or None, args.quality, args.images_in_a_file)
    try:
        how.check()
    except ValueError as error:
        raise UsageError(str(error).replace("in_a_part", "images_in_a_file")) from None
    check_folder(args.target)  # before all images are listed
    data = open_data(data_dir_of(args), args.data_format, on_corrupt=args.on_corrupt)
    begin = time.perf_counter()
    done = pack(data, args.target, how, args.workers)
    seconds = time.perf_counter() - begin
    images, found = (sum(facts[key] for facts in done.values()) for key in ("images", "found"))
    size = sum(facts["bytes"] for facts in done.values())
    before = sum(int(split.length.sum()) for split in data.splits.values())
    print(
        f"{images:,} images, {byte_size(size)} (before: {byte_size(before)}), checked, in {seconds:,.0f} s"
        + (f"; {found} files were there already" if found else "")
    )
    where = shlex.quote(args.target)
    print(f"next, or another case:\n  effnet-train {SOME_CASE} --data-dir {where}")
