"""Images of a data set: listed once into a manifest (image id, where its bytes lie, label), read by uri."""

from functools import lru_cache

import pyarrow as pa
from pyarrow import fs

from epic_ray.config import DataConfig, fingerprint
from epic_ray.errors import InputError
from epic_ray.logs import Reporter
from epic_ray.run_dir import RunDir, open_filesystem, resolve_root, table_file
from epic_ray.stages.loading import ClassNames
from epic_ray.tables import build_table, read_table, write_table

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class Listing:
    """The image files of a split, sorted by path: parallel columns rather than an object a file."""

    def __init__(self, split: str, paths: list[str], sizes: list[int], ignored: list[str], empty: list[str]) -> None:
        self.split, self.paths, self.sizes = split, paths, sizes
        self.ignored, self.empty_folders = ignored, empty

    def class_folder(self, path: str) -> str | None:
        """The first folder below the split's, or None for an image that lies in the split's folder itself."""
        parts = path.split("/")
        return parts[0] if len(parts) > 1 else None


def list_split(data: DataConfig, split: str) -> Listing:
    """The images of one split's folder. Raises InputError where the folder is absent or holds no image."""
    filesystem, root = open_filesystem(resolve_root(data.root))
    folder = f"{root.rstrip('/')}/{data.splits[split].strip('/')}"
    where = f"{data.root.rstrip('/')}/{data.splits[split].strip('/')}"
    try:
        found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{where}: no such folder (split `{split}`); {_folders_there(filesystem, root)}; "
            "set data.root or data.splits"
        ) from None
    except OSError as error:
        raise InputError(f"{where}: cannot be listed ({error})") from None
    try:
        entries = sorted((info.path[len(folder) + 1 :], info) for info in found)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: holds a name that is no UTF-8 ({error.object!r}); rename it") from None
    shown = [entry for entry in entries if not any(part.startswith(".") for part in entry[0].split("/"))]
    files = [(path, info.size) for path, info in shown if info.type == fs.FileType.File]
    images = [entry for entry in files if entry[0].lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise InputError(
            f"{where}: holds no image (split `{split}`); files that end in {', '.join(IMAGE_SUFFIXES)} are looked for"
        )
    ignored = [path for path, _ in files if not path.lower().endswith(IMAGE_SUFFIXES)]
    used = {path.split("/")[0] for path, _ in files}
    empty = [path for path, info in shown if info.type == fs.FileType.Directory and "/" not in path]
    empty = [path for path in empty if path not in used]
    return Listing(split, [path for path, _ in images], [size for _, size in images], ignored, empty)


def _folders_there(filesystem: fs.FileSystem, root: str) -> str:
    try:
        infos = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
    except NotADirectoryError:
        return f"{root} is a file"
    names = sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)
    return f"folders there: {', '.join(names[:8])}" if names else "the data set's root has no folders"


def class_folders(data: DataConfig, listings: list[Listing]) -> list[str]:
    """The names of all class folders, sorted; an empty folder is a class too, one with other files alone is none."""
    if data.labels == "none":
        return []
    used = {folder for listing in listings for path in listing.paths if (folder := listing.class_folder(path))}
    return sorted(used.union(*(listing.empty_folders for listing in listings)))


def build_manifest(data: DataConfig, listing: Listing, classes: ClassNames, root: str) -> pa.Table:
    """The manifest of a split. Raises InputError for a folder that matches no class of the head."""
    base = f"{data.splits[listing.split].strip('/')}"
    folders = [listing.class_folder(path) if data.labels == "folders" else None for path in listing.paths]
    where = f"{data.root.rstrip('/')}/{base}"
    index = {folder: classes.index_of(folder, where) for folder in sorted({name for name in folders if name})}
    count = len(listing.paths)
    return build_table(
        "manifest",
        {
            "split": pa.array([listing.split] * count, pa.string()),
            "position": pa.array(range(count), pa.int64()),
            "image_id": pa.array([f"{base}/{path}" for path in listing.paths], pa.string()),
            "uri": pa.array([f"{root.rstrip('/')}/{base}/{path}" for path in listing.paths], pa.string()),
            "label": pa.array([index.get(folder or "") for folder in folders], pa.int32()),
            "size_bytes": pa.array(listing.sizes, pa.int64()),
        },
    )


def images_fingerprint(data: DataConfig, manifests: dict[str, pa.Table]) -> str:
    """What the manifests say: ids, labels and sizes of the files; another listing is another data set."""
    digests = {
        split: fingerprint(*(table[name].to_pylist() for name in ("image_id", "label", "size_bytes")))
        for split, table in manifests.items()
    }
    return fingerprint("images", resolve_root(data.root), digests)


def write_manifests(run_dir: RunDir, manifests: dict[str, pa.Table]) -> int:
    return sum(write_table(run_dir, table_file("manifest", split), table) for split, table in manifests.items())


def read_manifest(run_dir: RunDir, split: str) -> pa.Table:
    return read_table(run_dir, table_file("manifest", split))


def report_listing(reporter: Reporter, listing: Listing) -> None:
    if listing.ignored:
        reporter.say(
            f"{listing.split}: {len(listing.ignored)} file(s) without an image suffix are left out, "
            f"first {listing.ignored[0]}"
        )
    if listing.empty_folders:
        reporter.say(f"{listing.split}: empty class folder(s): {', '.join(listing.empty_folders[:8])}")


@lru_cache(maxsize=64)
def _filesystem_of(scheme: str) -> fs.FileSystem:
    return open_filesystem(scheme)[0]


def read_image_bytes(uri: str) -> bytes:
    """The bytes behind a manifest's uri. Raises OSError."""
    if "://" not in uri:
        with open(uri, "rb") as file:
            return file.read()
    scheme, path = uri.split("://", 1)
    with _filesystem_of(f"{scheme}://{path.split('/', 1)[0]}").open_input_stream(path) as stream:
        return bytes(stream.read())
