"""Files: the media below a folder, in tars too; and how a set's list finds them by path, name or YouTube
id."""
import os
import re
import tarfile
from collections import Counter, deque

from tqdm import tqdm

from datasets import shards

# The endings that FFmpeg reads: of pictures, and of sound alone.
PICTURES = set(
    ".mp4 .m4v .mov .qt .mkv .mk3d .webm .avi .divx .wmv .asf .flv .f4v .mpg .mpeg .mpe .mpv .m1v .m2v .m2p "
    ".vob .evo .ts .mts .m2ts .m2t .tp .trp .tod .3gp .3g2 .ogv .ogm .mxf .gxf .dv .nut .rm .rmvb .wtv .mj2 "
    ".mjpg .mjpeg .amv .nsv .ivf .y4m .h264 .264 .h265 .265 .hevc".split())
SOUNDS = set(
    ".wav .wave .w64 .rf64 .bwf .flac .mp3 .mp2 .mp1 .mpa .m4a .m4b .m4r .aac .adts .ogg .oga .opus .spx "
    ".wma .aif .aiff .aifc .caf .mka .weba .amr .awb .3ga .ac3 .eac3 .ec3 .dts .au .snd .ape .tta .tak .wv "
    ".mpc .shn .dsf .dff .ra .oma .gsm .voc .sph .qoa".split())
MEDIA = PICTURES | SOUNDS
PACKED = set(".gz .bz2 .xz .zst .lz4 .lzma .z .br".split())      # behind .tar: compressed
TGZ = set(".tgz .taz .tbz .tbz2 .txz .tlz .tzst".split())       # the same in one
# Names, in small letters, of what a system puts beside the files; and all that begin with a dot.
JUNK = {"__macosx", "@eadir", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot",
        "~snapshot", "$recycle.bin", "recycler", "recycled", "system volume information", "lost+found",
        "lost.dir", "found.000", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "network trash folder",
        "temporary items", "__pycache__"}


class Files(list):
    """The media files below a folder, as sorted relative paths, those in tars among them, and the paths of
    what else was met."""
    def __init__(self, folder):
        self.folder = folder
        self.tars = []              # their paths
        self.inside = {}            # of the media files, those in a tar: (number of the tar, offset, size)
        self.links = set()          # of the media files, those that are links
        self.junk = []              # hidden or a system's own; a folder of this kind is not entered
        self.endings = Counter()    # how many files of each other ending
        self.broken = []            # links to nothing; pipes and devices
        self.again = []             # links to folders and tars that are taken already, or that hold this one
        self.unreadable = []        # folders
        self.damaged = []           # tars, all of it or from some place on
        self.packed = []            # compressed tars
        self.outside = []           # members of tars whose names lead out of the folder
        self.copies = []            # members that are there already, as a file or in another tar
        self.beside = []            # members of sound alone beside one with pictures and the same name

    def place(self, file):
        """The same for one media file by whatever path."""
        return self.inside.get(file) or identity(os.path.join(self.folder, file))

    def trouble(self):
        """What may hold clips and could not be looked at: short texts."""
        out = []
        if self.unreadable:
            out.append(f"{plural(self.unreadable, 'folder')} not readable: {few(self.unreadable)}")
        if self.damaged:
            out.append(f"{plural(self.damaged, 'tar')} not readable, or not to the end: {few(self.damaged)}")
        if self.packed:
            out.append(f"{plural(self.packed, 'compressed tar')}: {few(self.packed)}; unpack it, or gunzip "
                       "it: a compressed tar cannot be read in any order")
        return tuple(out)

    def left_out(self):
        """Short texts: what else is no clip."""
        out = []
        if self.endings:
            ordered = sorted(self.endings, key=lambda ending: (-self.endings[ending], ending))
            counts = [f"{self.endings[ending]:,} {ending}" for ending in ordered[:5]]
            if len(ordered) > 5:
                counts.append(f"{sum(self.endings[ending] for ending in ordered[5:]):,} of other endings")
            out.append(", ".join(counts))
        if self.junk:
            out.append(f"{plural(self.junk, 'hidden or system name')}: {few(self.junk)}")
        if self.broken:
            out.append(f"{len(self.broken):,} broken or no file: {few(self.broken)}")
        if self.again:
            out.append(f"{plural(self.again, 'link')} to a folder or tar that is here already: "
                       f"{few(self.again)}")
        if self.copies:
            out.append(f"{plural(self.copies, 'clip')} of a tar, here already: {few(self.copies)}")
        if self.beside:
            out.append(f"{plural(self.beside, 'sound')} beside pictures of the same name in a tar: "
                       f"{few(self.beside)}")
        if self.outside:
            out.append(f"{plural(self.outside, 'name')} in a tar, leading out of it: {few(self.outside)}")
        return out


def scan(folder, part=""):
    """The Files below a folder, sorted so that the order is the same on each machine, whatever endings the
    files have. part: below the folder of this name in it alone, and what tars beside that hold of it.

    Links to folders are followed, but each folder is entered once, by its own path rather than by a link, and
    none that holds `folder` itself: a link adds no clip that is there already, and none ends in a circle. The
    members of a tar count as files of the folder in which it lies; of two with one path the file counts, or
    that of the first tar."""
    files = Files(folder)
    if part:
        find_tars(files)
    entered = above(os.path.join(folder, part))
    folders = deque([part])
    if files.tars and not os.path.isdir(os.path.join(folder, part)):
        folders.clear()                                         # all of it lies in tars
    links = deque()                                             # to folders: they wait for the others
    while folders or links:
        place = (folders or links).popleft()
        for entry in enter(files, folder, place, entered):
            path = os.path.join(place, entry.name)
            kind = sort_out(files, path, entry)
            if kind == "folder":
                folders.append(path)
            elif kind == "link":
                links.append(path)
    read_tars(files, part)
    files.sort(key=lambda file: (bare(file), file))
    for paths in (files.junk, files.broken, files.again, files.unreadable, files.packed):
        paths.sort()
    return files


def find_tars(files):
    """Enter those that lie in the folder itself into `files`."""
    with os.scandir(files.folder) as entries:
        for entry in entries:
            if is_tar(entry.name) or is_packed(entry.name):
                sort_out(files, entry.name, entry)


def read_tars(files, part):
    """Enter the members of the tars into `files`. part: as in `scan`."""
    def is_link(tar):
        return os.path.islink(os.path.join(files.folder, tar))

    files.tars.sort(key=lambda tar: (is_link(tar), tar))        # a tar by its own path rather than by a link
    there = set(files)
    read = set()
    paths = [os.path.join(files.folder, tar) for tar in files.tars]
    known = all(os.path.exists(f"{path}{shards.INDEX}") for path in paths)
    for number, path in enumerate(tqdm(paths, desc="index of the tars", unit="tar", disable=known, delay=1)):
        tar = files.tars[number]
        try:
            if identity(path) in read:
                files.again.append(tar)
                continue
            read.add(identity(path))
            members = shards.read_places(path)
        except (OSError, tarfile.TarError, ValueError, ArithmeticError, LookupError):
            files.damaged.append(tar)
            continue
        if shards.REST in members[-1:]:
            files.damaged.append(tar)
            members.pop()
        read_tar(files, number, members, there, part)


def read_tar(files, number, members, there, part):
    """Enter the members of a tar into `files`. there: the paths of all media files, which grows."""
    tar = files.tars[number]
    shown = {without_ending(name) for name, _, _ in members if ending_of(name) in PICTURES}
    places = set()                                              # of this tar: a second one of these is a link
    junk = set()
    for name, offset, size in members:
        path = folder_of(tar) + name
        stem, ending = os.path.splitext(name)
        if part and not path.startswith(f"{part}/"):
            continue
        if name.startswith("/") or ".." in name.split("/"):
            files.outside.append(name)
        elif find_junk(name):
            junk.add(folder_of(tar) + find_junk(name))
        elif ending.lower() not in MEDIA:
            count_ending(files, name)
        elif (offset, size) == shards.NOWHERE:
            files.broken.append(path)
        elif stem in shown and ending.lower() in SOUNDS:
            files.beside.append(path)
        elif path in there:
            files.copies.append(path)
        else:
            files.append(path)
            there.add(path)
            files.inside[path] = (number, offset, size)
            if offset in places:
                files.links.add(path)
            places.add(offset)
    files.junk += junk


def above(folder):
    """The identities of the folders that hold a folder, itself left out."""
    out = set()
    path = os.path.realpath(folder)
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        if os.path.isdir(path):
            out.add(identity(path))
    return out


def enter(files, folder, place, entered):
    """What lies in a folder, sorted by name: nothing where it was entered before, or cannot be read."""
    path = os.path.join(folder, place)
    try:
        found = identity(path)
        if found in entered:
            files.again.append(place)
            return []
        entered.add(found)
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        files.unreadable.append(place or os.path.basename(folder))
        return []


def identity(folder):
    """The same for one folder by whatever path."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def sort_out(files, path, entry):
    """Enter what lies at a path into `files`; "folder", or "link" to one, where there is more to look at."""
    try:
        is_folder = entry.is_dir()
        is_file = entry.is_file()
    except OSError:                                             # a link that leads to itself
        is_folder = False
        is_file = False
    if is_junk(entry.name):
        files.junk.append(path)
    elif is_folder:
        return "link" if entry.is_symlink() else "folder"
    elif not is_file:
        files.broken.append(path)
    elif is_tar(entry.name):
        files.tars.append(path)
    elif is_packed(entry.name):
        files.packed.append(path)
    elif is_media(entry.name):
        files.append(path)
        if entry.is_symlink():
            files.links.add(path)
    elif not entry.name.lower().endswith(f".tar{shards.INDEX}"):
        count_ending(files, entry.name)
    return None


def count_ending(files, name):
    ending = ending_of(name)
    files.endings[ending if re.fullmatch(r"\.[\w~-]{1,12}", ending) else "without an ending"] += 1


def is_junk(name):
    return name.startswith((".", "~$")) or name.casefold() in JUNK


def find_junk(path):
    """The path up to the first name in it that is junk; None where there is none."""
    parts = path.split("/")
    for number, name in enumerate(parts):
        if is_junk(name):
            return "/".join(parts[:number + 1])
    return None


def ending_of(file):
    """The last ending, in small letters, with its dot."""
    return os.path.splitext(file)[1].lower()


def is_media(file):
    return ending_of(file) in MEDIA


def is_tar(file):
    return ending_of(file) == ".tar"


def is_packed(file):
    """A compressed tar."""
    return ending_of(without_ending(file)) == ".tar" and ending_of(file) in PACKED or ending_of(file) in TGZ


def without_ending(file):
    return os.path.splitext(file)[0]


def bare(file):
    """A path without all its endings of media: a.avi may have become a.mp4, and beside another a.mp4 it has
    become a.avi.mp4."""
    stem, ending = os.path.splitext(file)
    return bare(stem) if ending.lower() in MEDIA else file


def folder_of(file):
    """The folder in which a file lies, with the separator behind it; "" where there is none."""
    return file[:len(file) - len(os.path.basename(file))]


def name_of(file):
    """The file's name without its folder and its endings of media."""
    return bare(os.path.basename(file))


def by_path(files):
    """Path without its endings -> file: a set's .wav files may have been packed as .flac."""
    return {bare(file): file for file in files}


def by_name(files):
    """The file's name without its endings -> file, whatever folder it lies in."""
    return {name_of(file): file for file in files}


def by_id(files):
    """YouTube id -> file, for <id>.flac, <id>_40.000.mp4, <id>_<start>_<end>.mp4 and Y<id>.wav. An id has 11
    characters, and may itself begin with Y or hold underscores: a name that can be read in two ways is
    entered under both."""
    index = {}
    for file in files:
        name = name_of(file)
        if len(name) >= 12 and name[0] == "Y" and (len(name) == 12 or name[12] == "_"):
            index.setdefault(name[1:12], file)
        if len(name) == 11 or name[11:12] == "_":
            index[name[:11]] = file
    return index


def find_by_name_or_id(files, names):
    """For each of the names <id>_<start>...: the file of just this name, else that of its id, else None."""
    exact = by_name(files)
    index = by_id(files)
    found = []
    for name in names:
        found.append(exact[name] if name in exact else index.get(name[:11]))
    return found


def few(names, most=3):
    """The first of the names, each quoted on one line, and how many more there are."""
    shown = []
    for name in names[:most]:
        shown.append(repr(name if len(name) <= 40 else f"{name[:20]}...{name[-17:]}"))
    text = ", ".join(shown)
    return text if len(names) <= most else f"{text} and {len(names) - most:,} more"


def plural(names, word):
    """How many of what."""
    return f"{len(names):,} {word}{'' if len(names) == 1 else 's'}"


def printable(text):
    """What a terminal can show of a message with file names in it, which hold any bytes but / and 0."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
