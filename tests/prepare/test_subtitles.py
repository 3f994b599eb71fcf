from __future__ import annotations

import time

import numpy as np
import pytest

from emoscale.config import DataError
from emoscale.prepare.container import probe
from emoscale.prepare.sound import RATE, AudioReader
from emoscale.prepare.subtitles import Cue, SubtitleConfig, clean, cut, detect_speech, read


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("<i>Hello</i> there", "Hello there"),
        ("{\\an8\\pos(1,2)}Up", "Up"),
        ("- Who?\n- Me.", "Who? Me."),
        ("–Who?\\N— Me.", "Who? Me."),
        ("a - b, twenty-one", "a - b, twenty-one"),
        ("I &lt;3 you &amp; him", "I <3 you & him"),
        ("two\n\n  lines\t", "two lines"),
        ('<font color="#fff">x</font><br/>y', "x y"),
        ("<v Anna>Hi <00:01.500>you", "Hi you"),
        ("2 < 3 and 4 > 1", "2 < 3 and 4 > 1"),
        ("\ufeff\u200e♪", "♪"),
        ("{\\i1}", ""),
    ],
)
def test_clean_leaves_one_line_of_speech(text, line):
    assert clean(text) == line


def test_bilingual_cues_keep_the_lower_language():
    assert clean("你好\\N{\\fs12}Hello\\Nyou", keep_after_break=True) == "Hello you"
    assert clean("Hello", keep_after_break=True) == "Hello"


def test_srt_with_every_oddity(tmp_path, write_srt):
    path = write_srt(tmp_path / "a.srt", [(1, 2.5, "<i>- Hi</i>\n- You?"), (2.5, 4.0, "Fine.")])
    assert read(path, SubtitleConfig()) == [Cue(0, 1.0, 2.5, "Hi You?"), Cue(1, 2.5, 4.0, "Fine.")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(tmp_path, write_srt, encoding):
    path = write_srt(tmp_path / "a.srt", [(0, 2, "Garçon, où ?")])
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert read(path, SubtitleConfig())[0].text == "Garçon, où ?"


def test_ass_comments_and_drawings_are_no_cues(tmp_path):
    path = tmp_path / "a.ass"
    path.write_text(
        "[Script Info]\n\n[V4+ Styles]\n\n[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
        "Comment: 0,0:00:00.00,0:00:02.00,Default,,0,0,0,,note\n"
        "Dialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\b1}Hi\\Nyou\n"
        "Dialogue: 0,0:00:03.00,0:00:04.50,Default,,0,0,0,,{\\p1}m 0 0 l 1 1{\\p0}\n"
    )
    assert read(path, SubtitleConfig()) == [Cue(0, 1.0, 2.5, "Hi you")]


def test_vtt_of_a_film(shared):
    cues = read(shared / "av/movie/friday.vtt", SubtitleConfig())
    assert [cue.text for cue in cues][2] == "Tell me, is the lord of the universe in?"
    cuts, short = cut(cues, SubtitleConfig())
    assert short == 2
    assert [c.cue.number for c in cuts] == [2, 3, 4]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not readable as subtitles"),
        (b"just words\n", "not readable as subtitles"),
        (b"WEBVTT\n\n", "no cue"),
        (b"\x00\x01\x02PNG", "binary"),
        (b"1\n00:00:05,000 --> 00:00:02,000\nhi\n", "ends before it starts"),
    ],
)
def test_broken_files_say_why(tmp_path, data, reason):
    path = tmp_path / "a.srt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=reason):
        read(path, SubtitleConfig())


def test_cut_numbers_dialogues_and_drops_short_cues():
    cues = [Cue(0, 0, 2, "a"), Cue(1, 2, 2.5, "b"), Cue(2, 10, 12, "c"), Cue(3, 20.1, 22, "d"), Cue(4, 22, 23, "e")]
    cuts, short = cut(cues, SubtitleConfig())
    assert short == 1
    assert [(c.cue.text, c.dialogue, c.index) for c in cuts] == [("a", 0, 0), ("c", 0, 1), ("d", 1, 0), ("e", 1, 1)]
    assert cut(cues, SubtitleConfig(dialogue_gap=7.0))[0][1].dialogue == 1
    assert cut(cues, SubtitleConfig(min_duration=0.4))[1] == 0


def test_a_long_cue_under_others_keeps_the_dialogue():
    cues = [Cue(0, 0, 30, "song"), Cue(1, 1, 3, "a"), Cue(2, 25, 27, "b")]
    assert {c.dialogue for c in cut(cues, SubtitleConfig())[0]} == {0}


def test_speech_is_found_and_silence_is_not(shared):
    pytest.importorskip("silero_vad")
    with AudioReader(probe(shared / "audio/ravdess/03-01-01-01-01-01-01.flac")) as sound:
        wave = sound.between(0, 10)
    silence = np.zeros(3 * RATE, np.float32)
    whole = np.concatenate([silence, wave, silence, wave])

    def between(start: float, end: float) -> np.ndarray:
        return whole[round(start * RATE) : round(end * RATE)]

    cues = detect_speech(between, RATE, SubtitleConfig())
    later = 3 + len(wave) / RATE + 3
    assert [cue.number for cue in cues] == [0, 1]
    assert [cue.start for cue in cues] == pytest.approx([3 + 1.03, later + 1.03], abs=0.1)
    assert all(cue.text == "" for cue in cues)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"min_duration": -1.0}, "min_duration"),
        ({"vad_threshold": 1.5}, "vad_threshold"),
        ({"vad_max": 0.0}, "vad_max"),
    ],
)
def test_config_out_of_range(values, key):
    with pytest.raises(ValueError, match=f"^{key}: "):
        SubtitleConfig(**values).validate()


@pytest.mark.parametrize(
    "line",
    ["{" * 300_000, "<a" * 150_000, "&#" + "9" * 5000 + ";", "\\\\N" * 100_000, "-" * 200_000, "{a}" * 100_000, "<1" * 150_000, "00:00:01,000 --> " * 20_000],
    ids=lambda line: line[:8],
)
def test_no_line_takes_longer_than_its_length(tmp_path, line):
    path = tmp_path / "film.srt"
    path.write_text(f"1\n00:00:01,000 --> 00:00:02,500\n{line}\n\n2\n00:00:03,000 --> 00:00:05,000\nbye\n")
    begun = time.process_time()
    cues = read(path, SubtitleConfig())
    assert cues[-1].text.endswith("bye")
    assert time.process_time() - begun < 10


def test_braces_are_stripped_to_the_first_that_closes_them():
    assert [clean(text) for text in ("{a}b{c}", "{a{b}c", "a{b", "a}b{c}d", "{}")] == ["b", "c", "a{b", "a}bd", ""]
