"""Tar files: a clip in one is read where it lies, by its place in the file, so that each order of clips costs
the same. Members are called as in a folder: the tar itself is in no path of a listing."""
import contextlib
import json
import os
import posixpath
import re
import tarfile
import uuid

ADDRESS = re.compile(r"(.+\.tar)@([0-9]+)\+([0-9]+)/.+", re.DOTALL | re.IGNORECASE)
INDEX = ".index"                # the ending of the file beside a tar that holds the places of its members
NOWHERE = (0, 0)                # the place of what is no file, or does not lie whole in the tar
REST = ("", *NOWHERE)           # the last member of a tar that breaks off


def address(tar, offset, size, name):
    """A path that open_clip takes: the bytes [offset, offset + size) of a tar, which hold `name`."""
    return f"{tar}@{offset}+{size}/{name}"


def find_address(path):
    """(tar, offset, size) of a path of `address`; None where it is another path."""
    found = ADDRESS.fullmatch(os.fspath(path))
    return (found[1], int(found[2]), int(found[3])) if found else None


def is_clip(path):
    """Whether there is a file of this path, or of the tar in this address."""
    found = find_address(path)
    return os.path.isfile(path) or found is not None and os.path.isfile(found[0])


def read_members(path):
    """[(name, offset, size)] of the files that lie whole in a tar, by its headers. Raises OSError and
    tarfile.TarError where it is none."""
    return [member for member in read_headers(path) if member[1:] != NOWHERE]


def read_index(path):
    """read_members by the file beside the tar, as read_places has it."""
    return [member for member in read_places(path) if member[1:] != NOWHERE]


def read_headers(path):
    """[(name, offset, size)] of what is no folder in a tar; of two with one name the last counts, and a link
    has the place of the file that it leads to. What cannot be read is NOWHERE; a tar that breaks off ends
    with REST. Raises as read_members."""
    places = {}
    links = {}                                                  # symbolic: they may lead to a later member
    total = os.path.getsize(path)
    with tarfile.open(path, "r:") as tar:
        whole = False
        # a damaged header makes tarfile raise many kinds
        with contextlib.suppress(tarfile.TarError, ValueError, ArithmeticError, LookupError, MemoryError):
            for member in tar:
                name = tidy(member.name)
                end = member.offset_data + member.size
                if member.size < 0:
                    break
                if member.isreg() and not member.issparse():
                    places[name] = (member.offset_data, member.size) if end <= total else NOWHERE
                elif member.islnk():
                    places[name] = places.get(tidy(member.linkname), NOWHERE)
                elif member.issym():
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                elif not member.isdir():
                    places[name] = NOWHERE
            else:                                               # tarfile takes a damaged header for the end
                tar.fileobj.seek(tar.offset)
                whole = not tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0")
    for name, target in links.items():
        places[name] = places.get(target, NOWHERE)
    members = [(name, *place) for name, place in places.items()]
    return members if whole else [*members, REST]


def tidy(name):
    """A member's name without what changes nothing: "./a//b" -> "a/b". Absolute and ".." stay."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/" * name.startswith("/") + "/".join(parts)


def read_places(path):
    """read_headers by the file beside the tar, which is written where it is not there, or of another tar."""
    members = load_index(path)
    if members is None:
        tar = stamp(path)
        members = read_headers(path)
        if REST not in members[-1:]:                            # else it may still be written
            with contextlib.suppress(OSError):                  # a folder that is read-only
                write_index(path, members, tar)
    return members


def stamp(path):
    """{what tells one tar from another: its bytes and the time of its last change}"""
    status = os.stat(path)
    return {"size": status.st_size, "changed": status.st_mtime_ns}


def load_index(path):
    """The members by the file beside the tar; None where that does not hold the places of this tar."""
    try:
        tar = stamp(path)
        with open(f"{path}{INDEX}", encoding="utf-8") as file:
            found = json.load(file)
        members = [(name, offset, length) for name, offset, length in found["members"]]
        for name, offset, length in members:
            if not (type(name) is str and type(offset) is type(length) is int):
                return None
            if not 0 <= offset <= offset + length <= tar["size"]:
                return None
        return members if {key: found[key] for key in tar} == tar else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def write_index(path, members, tar):
    """Under a temporary name of one's own, then by a rename: of two that write it at once, one wins. tar: its
    stamp before the members were read. Raises OSError."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}{INDEX}.{uuid.uuid4().hex[:12]}.part")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump({**tar, "members": members}, file)
        os.replace(temporary, f"{path}{INDEX}")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
