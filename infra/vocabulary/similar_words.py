"""Makes the table that replaces a word no icon has a name for by a near noun: "poodle" -> "dog", "wolf" -> "dog".

What may be replaced are the more frequent single-word nouns of WordNet; what may replace them are the nouns of the
vocabulary, in the sense their icons show. A target's score is the cosine similarity of sentence embeddings (of word and
gloss) plus a bonus for what WordNet says: most where the target is a hypernym of the word in a few steps ("poodle": "dog"),
less where it is a hyponym ("vehicle": "car"), little where both have a near and specific hypernym in common ("wolf": "dog").
The best target is taken if its score reaches what `LEAST` asks of its kind. Words that name people and find nothing nearer
become "person". Frequent plurals of the words are in the table too.

Only the first sense of a word counts, or its second one if the first is nothing one can see. Words the grammar knows, words
used as verbs or adjectives more often than as nouns, insults, and names of persons never get a substitute. What was decided
by hand is in `similar_words.toml`. The same inputs give the same bytes. docs/generator.md says where the inputs come from.

    python infra/vocabulary/similar_words.py --wordnet FOLDER --encoder FOLDER --frequencies FILE
"""

from __future__ import annotations

import lzma
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import tyro

from millijoule.workers.scenes.prompts import GRAMMAR_WORDS
from millijoule.workers.scenes.vocabulary import ENTRIES, NOUN_NUMBER, NOUNS, WORD_NUMBER

HERE = Path(__file__).parent

# WordNet's lexicographer files (numbers as in lexnames(5WN)) of things one can see, and of some that need care
ANIMAL, ARTIFACT, BODY, FOOD, GROUP, LOCATION, OBJECT, PERSON, PHENOMENON, PLANT, SHAPE, SUBSTANCE = (
    5, 6, 8, 13, 14, 15, 17, 18, 19, 20, 25, 27,
)  # fmt: skip
VISIBLE = {ANIMAL, ARTIFACT, BODY, FOOD, OBJECT, PERSON, PHENOMENON, PLANT, SHAPE}
TARGETS_ONLY = {GROUP, LOCATION, SUBSTANCE}

#: What a target must score, by how WordNet relates it to the word; set by reading samples of every kind.
LEAST = {"hypernym": 0.55, "hyponym": 0.67, "relative": 0.6, "alike": 0.62}
#: Steps below the root from which on a common hypernym says anything.
LEAST_DEPTH = 6

INSULT = re.compile(
    r"slur|offensive|abuse|masturbat|contemptible|derogat|obscene|disparag|vulgar|insult|taboo|slang|"
    r"contempt|prostitut|sexual|genital|nazi|rapist|marijuana|cocaine|heroin|narcotic",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Options:
    """Make the table of similar words."""

    wordnet: Path
    """Folder of a WordNet 3 database: data.noun, index.noun, index.adj, noun.exc, cntlist.rev."""

    encoder: Path
    """Folder of the sentence encoder, in the format of transformers."""

    frequencies: Path
    """Words, the most frequent first, one a line."""

    output: Path = HERE.parents[1] / "workers/scenes/similar_words.tsv.xz"
    """The table: word, tab, noun."""

    explain: Path | None = None
    """Also write scores and reasons here."""


class Choices:
    """What `similar_words.toml` holds."""

    def __init__(self, path: Path = HERE / "similar_words.toml") -> None:
        raw = tomllib.loads(path.read_text())
        self.senses: dict[str, int] = raw["senses"]
        self.not_by_alias = frozenset(raw["not_by_alias"].split())
        self.not_targets = frozenset(raw["not_targets"].split())
        self.places = frozenset(raw["places"].split())
        self.by_hand: dict[str, str | None] = dict.fromkeys(raw["without_substitute"].split())
        self.by_hand |= {word: noun for noun, words in raw["by_hand"].items() for word in words.split()}
        self.never = frozenset(raw["other_words"].split()) | WORD_NUMBER.keys() | GRAMMAR_WORDS


class WordNet:
    """The nouns of a WordNet 3 database, by synset.

    Attributes:
        file: number of the lexicographer file.
        gloss: the definition, without examples.
        words: the lemmas.
        up, instance_of: hypernyms, and the classes that a named thing is one of.
        senses: synsets of each lemma, the most frequent first.
        uses: how often a lemma is a noun in tagged texts, and how often anything else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: dict[str, int] = {}
        self.gloss: dict[str, str] = {}
        self.words: dict[str, list[str]] = {}
        self.up: dict[str, list[str]] = {}
        self.instance_of: dict[str, list[str]] = {}
        for line in self._lines("data.noun"):
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            synset, words = fields[0], int(fields[3], 16)
            self.file[synset], self.gloss[synset] = int(fields[1]), gloss.split('; "')[0].strip()
            self.words[synset] = fields[4 : 4 + 2 * words : 2]
            pointers = fields[5 + 2 * words :]
            found = [(pointers[k], pointers[k + 1]) for k in range(0, 4 * int(fields[4 + 2 * words]), 4)]
            self.up[synset] = [target for kind, target in found if kind == "@"]
            self.instance_of[synset] = [target for kind, target in found if kind == "@i"]
        self.senses: dict[str, list[str]] = {}
        for line in self._lines("index.noun"):
            fields = line.split()
            self.senses[fields[0]] = fields[-int(fields[2]) :]
        self.adjectives = {line.split()[0] for line in self._lines("index.adj")}
        self.uses: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for line in self._lines("cntlist.rev"):
            key, _, count = line.split()
            word, rest = key.split("%")
            self.uses[word][rest[0] != "1"] += int(count)

    def _lines(self, name: str) -> list[str]:
        """Lines of a file, without the licence at its head."""
        return [x for x in (self.folder / name).read_text().splitlines() if not x.startswith(" ")]

    @cached_property
    def irregular_plurals(self) -> list[tuple[str, str]]:
        """Pairs of a plural and its singular."""
        return [(f[0], f[1]) for f in (line.split() for line in self._lines("noun.exc"))]

    def steps_up(self, synset: str, limit: int) -> dict[str, int]:
        """Hypernyms within `limit` steps, and the synset itself, with their distance."""
        steps, frontier = {synset: 0}, [synset]
        for distance in range(1, limit + 1):
            frontier = [h for s in frontier for h in self.up[s] if h not in steps]
            steps.update(dict.fromkeys(frontier, distance))
        return steps

    def depth(self, synset: str) -> int:
        """Steps to the furthest hypernym, 20 at most."""
        return max(self.steps_up(synset, 20).values())

    def is_mostly_noun(self, word: str) -> bool:
        """Whether texts use `word` as a noun at least as often as otherwise."""
        noun, other = self.uses[word]
        return noun >= other if noun + other else word not in self.adjectives

    def visible_sense(self, word: str, chosen: int | None = None) -> str | None:
        """The synset that an icon named `word` shows: sense number `chosen`, else the first visible one of the first three."""
        senses = self.senses.get(word.replace(" ", "_"), [])
        if chosen is not None:
            return senses[chosen - 1] if 0 < chosen <= len(senses) else None
        for allowed in (VISIBLE, TARGETS_ONLY):
            for synset in senses[:3]:
                if self.file[synset] in allowed and not self.instance_of[synset]:
                    return synset
        return None


class Targets:
    """What can stand for a word: the nouns, and the synsets that they and their aliases name.

    Attributes:
        synsets: of each noun, None where it has none.
        named: synset -> number of the noun.
        below: synset -> nouns below it or at it, with their distance.
        allowed: bool `[nouns]`.
    """

    def __init__(self, wordnet: WordNet, choices: Choices) -> None:
        self.synsets = [wordnet.visible_sense(noun, choices.senses.get(noun)) for noun in NOUNS]
        self.allowed = np.array([noun not in choices.not_targets for noun in NOUNS])
        self.named: dict[str, int] = {}
        for n, synset in enumerate(self.synsets):
            if synset and self.allowed[n]:
                self.named.setdefault(synset, n)
        for n, entry in enumerate(ENTRIES):
            for alias in entry.aliases:
                synset = None if alias in choices.not_by_alias else wordnet.visible_sense(alias)
                if synset and self.allowed[n]:
                    self.named.setdefault(synset, n)
                    self.synsets[n] = self.synsets[n] or synset
        self.below: dict[str, dict[int, int]] = defaultdict(dict)
        for synset, n in self.named.items():
            for above, distance in wordnet.steps_up(synset, 4).items():
                self.below[above][n] = min(distance, self.below[above].get(n, 9))

    def texts(self, wordnet: WordNet) -> list[tuple[str, str]]:
        """Pairs of each noun and what it is."""
        return [
            (entry.noun, short_gloss(wordnet, synset) if synset else ", ".join(entry.aliases) or entry.noun)
            for entry, synset in zip(ENTRIES, self.synsets, strict=True)
        ]


@dataclass(frozen=True)
class Substitute:
    """The noun that stands for a word, with its score and how WordNet relates the two."""

    noun: str
    score: float
    reason: str


def short_gloss(wordnet: WordNet, synset: str) -> str:
    """The first part of a synset's definition."""
    return wordnet.gloss[synset].split(";")[0]


def find_words(
    wordnet: WordNet, targets: Targets, choices: Choices, frequent: set[str]
) -> list[tuple[str, str]]:
    """Words that may need a substitute, with the synset that they most likely mean."""
    words = []
    for word in sorted(frequent):
        if not re.fullmatch(r"[a-z]{3,}", word) or word in choices.never:
            continue
        senses = wordnet.senses.get(word, [])[:2]
        if not senses or not wordnet.is_mostly_noun(word) or INSULT.search(wordnet.gloss[senses[0]]):
            continue
        if wordnet.instance_of[senses[0]]:
            if place_of(wordnet, targets, choices, senses[0]):
                words.append((word, senses[0]))
            continue
        visible = [s for s in senses if wordnet.file[s] in VISIBLE and not wordnet.instance_of[s]]
        if (
            not visible
            or INSULT.search(wordnet.gloss[visible[0]])
            or wordnet.words[visible[0]][0][0].isupper()
        ):
            continue
        if [wordnet.file[s] for s in visible] in ([PLANT, FOOD], [PERSON, ANIMAL]):
            visible.reverse()  # a pomegranate is the fruit rather than the tree, a tiger the animal
        words.append((word, visible[0]))
    return words


def place_of(wordnet: WordNet, targets: Targets, choices: Choices, synset: str) -> str | None:
    """The noun of the kind of places that a named place is one of."""
    kinds = (NOUNS[targets.named[h]] for h in wordnet.instance_of[synset] if h in targets.named)
    return next((noun for noun in kinds if noun in choices.places), None)


def choose(
    wordnet: WordNet, targets: Targets, word: str, synset: str, similar: np.ndarray
) -> Substitute | None:
    """The best target of a word, if it is good enough; `similar` is the word's similarity to each noun, `[nouns]`."""
    file, people = wordnet.file[synset], wordnet.senses["person"][0]
    same_file = np.array([s is not None and wordnet.file[s] == file for s in targets.synsets])
    score = similar - 0.1
    score = np.where(same_file, score, score - 0.1)
    reason = np.full(len(NOUNS), "alike", object)

    def offer(n: int, value: float, why: str) -> None:
        if value > score[n]:
            score[n], reason[n] = value, why

    for above, up in wordnet.steps_up(synset, 5).items():
        if above == people:
            continue
        if above in targets.named and up <= 4:
            n = targets.named[above]
            offer(n, similar[n] + 0.62 - 0.09 * up, f"hypernym {up}")
        specific = wordnet.depth(above) >= LEAST_DEPTH
        for n, down in targets.below[above].items():
            if up == 0 and down:
                offer(n, similar[n] + 0.28 - 0.06 * down, f"hyponym {down}")
            elif down and specific and up + down <= 5 and file != PERSON:
                offer(n, similar[n] + 0.2 - 0.04 * (up + down), f"relative {up}+{down}")
    score[~targets.allowed] = -1
    score[NOUN_NUMBER["person"]] = -1
    best = int(score.argmax())
    kind = reason[best].split()[0]
    is_first_sense = synset in wordnet.senses[word][: 1 + (file in (FOOD, ANIMAL))]
    least = LEAST[kind] + (0 if is_first_sense else 0.1)
    if kind == "relative" and file in (ANIMAL, PLANT, FOOD):
        least -= 0.05
    if score[best] >= least and not (file == PERSON and kind == "alike"):
        return Substitute(NOUNS[best], float(score[best]), reason[best])
    if file == PERSON and is_first_sense and people in wordnet.steps_up(synset, 6):
        return Substitute("person", 0.0, "person")
    return None


def make_table(options: Options) -> dict[str, Substitute]:
    """The substitute of every word that has one."""
    choices, wordnet = Choices(), WordNet(options.wordnet)
    targets = Targets(wordnet, choices)
    frequent = {x.split()[0] for x in options.frequencies.read_text("utf-8-sig").splitlines() if x.split()}
    words = find_words(wordnet, targets, choices, frequent)
    similarity = embed_with_gloss([(w, short_gloss(wordnet, s)) for w, s in words], options.encoder)
    similarity = similarity @ embed_with_gloss(targets.texts(wordnet), options.encoder).T
    table: dict[str, Substitute] = {}
    for (word, synset), similar in zip(words, similarity, strict=True):
        if wordnet.instance_of[synset]:
            place = place_of(wordnet, targets, choices, synset)
            found = Substitute(place, 0.0, "place") if place else None
        else:
            found = choose(wordnet, targets, word, synset, similar)
        if found:
            table[word] = found
    for word, noun in choices.by_hand.items():
        table.pop(word, None)
        if noun in NOUN_NUMBER and word not in WORD_NUMBER.keys() | GRAMMAR_WORDS:
            table[word] = Substitute(noun, 1.0, "by hand")
    never = choices.never | choices.by_hand.keys()
    for plural, word in find_plurals(wordnet, frequent, table).items():
        is_other_word = plural in wordnet.senses and wordnet.uses[plural][0]
        if not is_other_word and table[word].noun != "city" and plural not in never | table.keys():
            table[plural] = Substitute(table[word].noun, table[word].score, "plural")
    return table


def find_plurals(wordnet: WordNet, frequent: set[str], table: dict[str, Substitute]) -> dict[str, str]:
    """plural -> word, of the table's words, where the plural is a frequent word itself."""
    found = {
        plural: word for plural, word in wordnet.irregular_plurals if word in table and plural in frequent
    }
    for word in sorted(table):
        for end, plural_end in (("y", "ies"), ("", "s"), ("", "es")):
            plural = word.removesuffix(end) + plural_end
            if word.endswith(end) and plural in frequent:
                found.setdefault(plural, word)
    return found


def embed_with_gloss(pairs: Sequence[tuple[str, str]], encoder: Path) -> np.ndarray:
    """Unit vectors of words and of words with what they are, averaged: float32 `[pairs, width]`."""
    rows = embed([word for word, _ in pairs] + [f"{word}: {gloss}" for word, gloss in pairs], encoder)
    mean = rows[: len(pairs)] + rows[len(pairs) :]
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@torch.inference_mode()
def embed(texts: Sequence[str], encoder: Path) -> np.ndarray:
    """Unit sentence embeddings, float32 `[texts, width]`: the mean over tokens, as the encoder was trained."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
    model = AutoModel.from_pretrained(encoder, local_files_only=True).eval()
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    rows = np.zeros((len(texts), model.config.hidden_size), np.float32)
    for first in range(0, len(order), 128):
        batch = order[first : first + 128]
        tokens = tokenizer(
            [texts[k] for k in batch], padding=True, truncation=True, max_length=40, return_tensors="pt"
        )
        hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        rows[batch] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return rows


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)  # the same sums in the same order on every machine of a kind
    table = sorted(make_table(options).items())
    lines = "".join(f"{word}\t{found.noun}\n" for word, found in table)
    options.output.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    if options.explain:
        reasons = (f"{word}\t{found.noun}\t{found.score:.3f}\t{found.reason}\n" for word, found in table)
        options.explain.write_text("".join(reasons))
    print(f"{options.output}: {len(table)} words")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
