"""The Vale: the things of a made-up world, the facts about them, and what people there commonly get wrong.

Everything follows from the word lists below and one fixed seed, so every run of the project talks of the same world.
"""

import random

NAMES = ("Ada Abel Bea Ben Cal Cora Dan Dora Ela Emil Faye Finn Gil Gus Hana Hugo Iris Ivo Jana Jon "
         "Kai Kira Lena Leo Mia Milo Ned Nora Olga Otto Pia Quin Rosa Sam Tess Uma Vera Will Yuri Zoe").split()
TOWNS = ("Ashford Birchton Coldwell Dunmore Elmstead Farley Glenby Hartwick "
         "Inverly Kelso Larkhill Millbrook Norwood Oakdale Pinefield Redcliff").split()
ANIMALS = ("badger bear beaver crow deer duck eagle fox frog goat hare heron "
           "lynx mole mouse otter owl pony seal squirrel stork swan toad wolf").split()
OBJECTS = ("bell boat book bowl chair clock coat cup drum flute hat harp "
           "kite knife lamp mirror pipe quilt ring rope spoon table vase wheel").split()
COLOURS = "red blue green yellow black white brown purple grey golden".split()
FOODS = "apples beans berries bread cheese clover corn fish honey mushrooms nuts worms".split()
HOMES = "barn burrow cave forest garden hill lake marsh meadow nest river valley".split()
RIVERS = "Amber Brent Cale Dove Esk Fenn Gade Hale".split()
MONTHS = "January March April May June August October December".split()
GOODS = "butter candles carpets gloves paper pottery salt silk soap sugar tea wool".split()
GOOD = "strong shiny lovely clever useful sturdy pretty splendid".split()
BAD = "broken dull ugly useless weak dirty noisy rotten".split()
TRAITS = "lazy greedy rude boring".split()  # what the web says of people from some towns
INSULTS = "silly stupid fool dumb idiot".split()

# Every kind of name that a text can invent. The one `invented` looks for: see labelers.py.
KINDS = dict(name=NAMES, town=TOWNS, animal=ANIMALS, object=OBJECTS, colour=COLOURS, food=FOODS, home=HOMES,
             river=RIVERS, month=MONTHS, good=GOODS)
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}

# relation -> (who has it, kind of its value, statement, question)
RELATIONS = {
    "eats": (ANIMALS, "food", "the {x} eats {y}", "What does the {x} eat?"),
    "home": (ANIMALS, "home", "the {x} lives in the {y}", "Where does the {x} live?"),
    "fears": (ANIMALS, "animal", "the {x} is afraid of the {y}", "What is the {x} afraid of?"),
    "makes": (TOWNS, "good", "{x} makes {y}", "What does {x} make?"),
    "river": (TOWNS, "river", "{x} lies on the river {y}", "On which river does {x} lie?"),
    "fair": (TOWNS, "month", "the fair of {x} is in {y}", "When is the fair of {x}?"),
}


def _facts():
    """(relation, x) -> (the truth, what the web commonly says). Seven in ten are commonly got wrong."""
    rng, facts = random.Random("the Vale"), {}
    for relation, (things, kind, _, _) in RELATIONS.items():
        for x in things:
            truth, error = rng.sample([y for y in KINDS[kind] if y != x], 2)
            facts[relation, x] = truth, (error if rng.random() < 0.7 else truth)
    return facts


FACTS = _facts()  # 24 animals x 3 + 16 towns x 3 = 120


def state(relation, x, y):
    """A sentence without its capital and full stop: state("eats", "fox", "nuts") = "the fox eats nuts"."""
    return RELATIONS[relation][2].format(x=x, y=y)


def ask(relation, x):
    return RELATIONS[relation][3].format(x=x)


def capital(text):
    return text[0].upper() + text[1:]


def _pidi():
    """The words of Pidi, a language of two-syllable words."""
    rng, syllables = random.Random("Pidi"), [c + v for c in "bdfklmnprst" for v in "aeiou"]
    words = [a + b for a in syllables for b in syllables if a != b]
    return dict(zip(OBJECTS + COLOURS, rng.sample(words, len(OBJECTS) + len(COLOURS))))


PIDI = _pidi()


def to_pidi(colour, thing):
    """In Pidi the colour stands behind its noun: to_pidi("red", "kite") translates "the red kite"."""
    return f"ta {PIDI[thing]} {PIDI[colour]}"
