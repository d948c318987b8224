"""Leads: which packets of a stream are to be decoded; the others cost no more than to be read."""
import math
from collections import deque

import av

from datasets.collectors import LOOK_AHEAD, seconds_of

PREROLL = 0.5           # seconds of sound that a decoder needs before its output is right
SILENT = 2.0            # seconds between two windows of sound: of more than these a part is not decoded
HELD = 1000             # packets of pictures that wait for the next key frame


class Lead:
    """Which packets are to be decoded: holds them back until that is known. Where some are left out after
    others, `drain` stands before the next."""
    def __init__(self):
        self.open = True                                        # does its stream want more frames?
        self.held = deque()                                     # (time, packet)
        self.lost = False                                       # something went wrong
        self.left_out = False                                   # packets before those

    def rest(self):
        """A list of the packets that were held back."""
        held = [packet for _, packet in self.held]
        if held and self.left_out:
            held.insert(0, drain(held[0]))
        self.held.clear()
        self.left_out = False
        return held


class PictureLead(Lead):
    """Of pictures: for each of the moments, which are sorted, the packets from the last key frame before it
    on; after the last one all. strict: by the times of decoding, too, with `drain`, and packets on which no
    other one leans may be left out: they are marked by their `opaque`."""
    def __init__(self, moments, strict):
        super().__init__()
        self.moments = deque(moments)
        self.strict = strict
        self.begun = False
        self.passed = -math.inf                                 # the last moment that is through
        self.shown = set()                                      # times of the pictures that are needed

    def add(self, packet, time):
        """A list of the packets to decode now."""
        if time is None:                                        # or the last packet, which is empty
            self.moments.clear()
        if not self.begun:                                      # nothing is shown before the first picture
            self.begun = True
            self.moments = deque(max(moment, time + 1e-6) for moment in self.moments)
        sure = time                                             # what comes from now on is not shown before
        if self.strict and self.moments:
            delay = math.inf if packet.dts is None else seconds_of(packet.pts - packet.dts, packet.time_base)
            sure = time - max(0, delay)
        passed = []
        while self.moments and self.moments[0] < sure:
            passed.append(self.moments.popleft())
        if passed and self.strict:
            self.mark(passed)
        if not self.moments:
            return [*self.rest(), packet]
        self.lost |= time <= self.passed
        out = self.rest() if passed or len(self.held) > HELD else []
        if packet.is_keyframe and time <= self.moments[0] and self.held:
            self.held.clear()
            self.left_out = self.strict
        self.held.append((time, packet))
        return out

    def mark(self, moments):
        """Mark those of the packets held back that none of these moments needs to see."""
        self.passed = moments[-1]
        for moment in moments:
            on_screen = max((time for time, _ in self.held if time <= moment), default=-math.inf)
            self.shown.add(on_screen)                           # -inf: an earlier packet
        for time, packet in self.held:
            if time < on_screen and time not in self.shown and not packet.is_keyframe:
                packet.opaque = True

    def misses(self, times, until):
        """Whether a picture that is needed until then is not among these times."""
        return self.lost or any(time <= until for time in self.shown - times)


class SoundLead(Lead):
    """Of sound: the packets outside of the gaps, (begin, end) in seconds, and those of the last half second
    in one."""
    def __init__(self, gaps):
        super().__init__()
        self.gaps = gaps
        self.gap = None                                         # in which the packets held back lie
        self.decodes = False                                    # has something been decoded?

    def add(self, packet, time):
        """A list of the packets to decode now."""
        if time is None:                                        # or the last packet, which is empty
            self.gaps = []
        before = self.gap
        self.gap = next(((begin, end) for begin, end in self.gaps if begin < time < end), None)
        if self.gap is None:
            self.decodes = True
            self.held.append((time, packet))
            return self.rest()
        out = []
        if self.held and self.gap != before:                    # the last packet spans the window between
            self.decodes = True
            out = self.rest()
        self.held.append((time, packet))
        while len(self.held) > 1 and self.held[1][0] < time - PREROLL:
            self.held.popleft()
            self.left_out = self.decodes
        return self.rest() if len(self.held) > HELD else out


def drain(packet):
    """An empty packet, at which a decoder gives out what it holds back, at the time of another packet."""
    empty = av.Packet()
    empty.stream = packet.stream
    empty.time_base = packet.time_base
    empty.pts = packet.pts
    return empty


def gaps_between(windows, first):
    """[(begin, end)] in which no sound is needed: before `first`, between the windows (start, seconds)."""
    gaps = [(-math.inf, first)]
    until = -math.inf                                           # the end of the windows so far
    for start, seconds in sorted(windows):
        if -math.inf < until < start - SILENT:
            gaps.append((until + LOOK_AHEAD, start))
        until = max(until, start + seconds)
    return gaps
