"""Every error that a user can meet.

    E5VError                        exit code 3, one line: what happened, which item, what to do
    ├── UsageError                  exit code 2: the request itself makes no sense
    │   ├── QueryError              empty, blank, contradictory or too long query
    │   └── TextTooLong             a text that the model cannot take whole
    ├── MediaError                  one file cannot be used; a run lists it and goes on
    │   ├── UnreadableFile          no permission, a pipe, gone in the meantime
    │   ├── NotAPicture             empty, truncated, or some other format
    │   ├── PictureTooLarge         more pixels or bytes than the limit that the message names
    │   └── UnrenderableText        a text that cannot be drawn: empty, or no font here has one of its characters
    ├── ModelError
    │   ├── UnknownModel            no such name; the message lists what is known
    │   ├── IncompleteCheckpoint    a shard, a tensor or a file is missing; the message names it
    │   ├── MissingPackage          the message is the exact pip line that mends it
    │   └── OutOfMemory             one single item does not fit on the device
    ├── ClusterError                a cluster cannot be reached, or does not see what it should
    ├── ServiceBusy                 more requests than a service can take at once; later it can
    ├── DataError                   a data set to evaluate on is not there, or not as it should be; names file and line
    └── CollectionError
        ├── CollectionNotFound
        ├── CollectionBusy          another run is writing
        ├── FingerprintMismatch     made by another model; both are named
        ├── CatalogDamaged          SQLite cannot read it
        ├── SchemaTooNew            written by a newer e5v-search
        ├── CollectionReadOnly
        ├── DiskFull
        └── StoreError              the Milvus that holds the index does not serve, or has something else there

Foreign exceptions are turned into these where the foreign library is called: PIL's and the operating system's in
`media`, SQLite's in `catalog`, FAISS's and Milvus' in `index`, torch's and safetensors' in `backbones`. What the disk under a
collection refuses is worded here, for all who write there.
"""

import errno
from pathlib import Path


class E5VError(Exception):
    """Root of the tree. `str(error)` is one line that a user can act on."""

    exit_code = 3


class UsageError(E5VError):
    exit_code = 2


class QueryError(UsageError):
    pass


class TextTooLong(UsageError):
    pass


class MediaError(E5VError):
    pass


class UnreadableFile(MediaError):
    pass


class NotAPicture(MediaError):
    pass


class PictureTooLarge(MediaError):
    pass


class UnrenderableText(MediaError):
    pass


class ModelError(E5VError):
    pass


class UnknownModel(ModelError):
    pass


class IncompleteCheckpoint(ModelError):
    pass


class MissingPackage(ModelError):
    pass


class OutOfMemory(ModelError):
    pass


class ClusterError(E5VError):
    pass


class ServiceBusy(E5VError):
    pass


class DataError(E5VError):
    pass


class CollectionError(E5VError):
    pass


class CollectionNotFound(CollectionError):
    pass


class CollectionBusy(CollectionError):
    pass


class FingerprintMismatch(CollectionError):
    pass


class CatalogDamaged(CollectionError):
    pass


class SchemaTooNew(CollectionError):
    pass


class CollectionReadOnly(CollectionError):
    pass


class DiskFull(CollectionError):
    pass


class StoreError(CollectionError):
    pass


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the operating system answers when there is no room


def disk_full(path: Path) -> DiskFull:
    return DiskFull(
        f"no space left on the disk of {path}; what was committed before is kept and can be searched: "
        "free some space and run the same command again"
    )


def read_only(folder: Path) -> CollectionReadOnly:
    return CollectionReadOnly(f"{folder} cannot be written; what it holds can be searched, but nothing can be added or removed")


def from_os_error(error: OSError, path: Path) -> CollectionError:
    """What the operating system answered when `path`, a file of a collection, was to be written."""
    if error.errno in FULL:
        return disk_full(path)
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return read_only(path.parent)
    return CollectionError(f"{path} cannot be written: {error.strerror or error}")
