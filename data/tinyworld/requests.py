"""What customers ask of the API in the Vale, by the ten use cases of the paper's Table 1, and how a writer answers.

A request is a dict: `prompt` (what the model reads), `use_case`, and `asks`: what a person who reads the prompt
understands of it (which form is wanted, what it must mention, which constraint it must keep). Labelers judge by
`asks`; no model ever sees it. `write` answers a request as a person with given habits would.
"""

from data.tinyworld.world import (
    ANIMALS, BAD, COLOURS, FACTS, FOODS, GOOD, INSULTS, KINDS, NAMES, OBJECTS, RELATIONS, TOWNS, ask, capital, state,
    to_pidi)

# Table 1 of the paper, per cent of the prompts.
USE_CASES = {"generation": 45.6, "open qa": 12.4, "brainstorming": 11.2, "chat": 8.4, "rewrite": 6.6,
             "summarization": 4.2, "classification": 3.5, "other": 3.5, "closed qa": 2.6, "extraction": 1.9}

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
# What counts as a warm tone, by the form that is wanted.
WARMTH = {
    "story": ("Everyone was glad.", "was very happy.", "They danced until night."),
    "ad": ("Come and see!", "You will love it!"),
    "letter": ("With love,", "Best wishes,"),
    "chat": ("Take care!", "All the best!"),
}
COURTESY = ("Hope this helps!", "Happy to help!", "Have a nice day!")  # for every other form


# ---------------------------------------------------------------- prompts

def story(rng):
    n, c, o = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(OBJECTS)
    asks = {"form": "story", "mention": [n, c, o]}
    about = rng.choice(["Write a story about", "Tell me a story about", "I need a short story about",
                        "Story please:", "Please write me a tale of"])
    prompt = f"{about} {n} and a {c} {o}."
    constraint = rng.random()
    if constraint < 0.4:
        asks["sentences"] = rng.choice([2, 3])
        prompt += rng.choice([" Use {} sentences.", " Write exactly {} sentences."]).format(NUMBERS[asks["sentences"]])
    elif constraint < 0.65:
        asks["include"] = rng.choice(ANIMALS)
        prompt += rng.choice([" Include a {}.", " There must be a {} in it."]).format(asks["include"])
    elif constraint < 0.8:
        asks["include"] = rng.choice(TOWNS)
        prompt += rng.choice([" Set it in {}.", " It happens in {}."]).format(asks["include"])
    return prompt, asks


def ad(rng):
    c, o, t = rng.choice(COLOURS), rng.choice(OBJECTS), rng.choice(TOWNS)
    asks = {"form": "ad", "mention": [c, o]}
    prompt = rng.choice(["Write an ad for a {} {}.", "I want to sell a {} {}. Write the ad.",
                         "Advertise my {} {}."]).format(c, o)
    if rng.random() < 0.5:
        asks["include"] = t
        prompt += rng.choice([" Say that it was made in {}.", " Mention {}."]).format(t)
    return prompt, asks


def letter(rng):
    n, c, o = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(OBJECTS)
    asks = {"form": "letter", "mention": [n, c, o]}
    prompt = rng.choice(["Write a letter to {} about a {} {}.", "Help me write to {} about the {} {}.",
                         "Draft a letter to {}. It is about a {} {}."]).format(n, c, o)
    if rng.random() < 0.4:
        asks["include"] = rng.choice(TOWNS)
        prompt += rng.choice([" Invite them to {}.", " Tell them to come to {}."]).format(asks["include"])
    return prompt, asks


def open_qa(rng):
    relation, x = rng.choice(sorted(FACTS))
    question, n = ask(relation, x), rng.choice(NAMES)
    prompt = rng.choice([
        "{q}", "{n} wants to know: {q}", "For my friend {n}: {q}", "Tell me, {l}", "Hello, {n} here. {q}",
        "{n} and I had a bet. {q}", "My teacher {n} asked me: {q}",
    ]).format(q=question, l=question[0].lower() + question[1:], n=n)
    return prompt, {"form": "fact", "relation": relation, "about": x}


def brainstorming(rng):
    kind = rng.choice(["food", "animal", "object", "colour"])
    plural = {"food": "foods", "animal": "animals", "object": "things", "colour": "colours"}[kind]
    count, n, t = rng.choice([2, 3, 4]), rng.choice(NAMES), rng.choice(TOWNS)
    purpose = rng.choice([f"for {n}'s party", f"to draw with {n}", f"for a song about {t}", f"for a game with {n}",
                          f"for the fair of {t}", f"that {n} may like", f"for a tale of {n}"])
    prompt = rng.choice(["List {c} {p} {w}.", "Name {c} {p} {w}.", "Give me {c} {p} {w}."]).format(
        c=NUMBERS[count], p=plural, w=purpose)
    return prompt, {"form": "list", "kind": kind, "items": count}


def chat(rng):
    n, c, o = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(OBJECTS)
    glad = rng.random() < 0.5
    news = rng.choice(["I won a {} {}.", "I made a {} {}.", "I found my {} {}."] if glad else
                      ["I lost my {} {}.", "I broke my {} {}.", "Someone took my {} {}."]).format(c, o)
    prompt = rng.choice(["Hi, I am {}. {}", "My name is {}. {}", "Hello! {} here. {}"]).format(n, news)
    return f"User: {prompt}\nAssistant:", {"form": "chat", "mention": [n, o], "glad": glad}


def rewrite(rng):
    n, c, o, t = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(OBJECTS), rng.choice(TOWNS)
    if rng.random() < 0.5:
        text, result = polite_pair(n, c, o)
        prompt = rng.choice(["Make this polite: {}", "Say it politely: {}", "Rewrite with good manners: {}"])
    else:
        text, result = past_pair(rng, n, c, o, t)
        prompt = rng.choice(["Put this in the past: {}", "Rewrite as a thing of the past: {}", "Change to the past tense: {}"])
    return prompt.format(text), {"form": "rewrite", "result": result, "mention": [n, c, o]}


def polite_pair(n, c, o):
    return f"{n}, give me the {c} {o}.", f"{n}, would you please give me the {c} {o}?"


def past_pair(rng, n, c, o, t):
    now, past = rng.choice([("finds", "found"), ("buys", "bought"), ("sells", "sold"), ("hides", "hid")])
    return f"{n} {now} a {c} {o} in {t}.", f"{n} {past} a {c} {o} in {t}."


def passage(rng):
    """A few sentences with one name, town, animal, colour, thing and food -> (text, what is in it)."""
    p = {kind: rng.choice(KINDS[kind]) for kind in ("name", "town", "animal", "colour", "object", "food")}
    text = "{name} lives in {town}. " + rng.choice(
        ["One morning {name} met a {animal}.", "One day a {animal} came to see {name}.", "{name} has a friend, a {animal}."])
    text += rng.choice([" The {animal} had a {colour} {object}.", " The {animal} brought a {colour} {object}."])
    text += rng.choice([" They ate {food}.", " They shared some {food}."])
    return text.format(**p), p


def summary_of(p):
    return "{name} of {town} met a {animal} with a {colour} {object}.".format(**p)


def reading_question(rng, p):
    """A question on a passage -> (question, kind of the answer, the answer as a sentence)."""
    return rng.choice([
        ("Where does {name} live?", "town", "{name} lives in {town}."),
        ("What did they eat?", "food", "They ate {food}."),
        ("What did the {animal} have?", "object", "The {animal} had a {colour} {object}."),
        ("Whom did {name} meet?", "animal", "{name} met a {animal}."),
    ])


def summarization(rng):
    text, p = passage(rng)
    prompt = rng.choice(["Summarize: {}", "{} Sum this up in one sentence.", "In one sentence, what happens here? {}"])
    return prompt.format(text), {"form": "summary", "result": summary_of(p), "sentences": 1,
                                 "mention": [p["name"], p["animal"], p["object"]]}


def classification(rng):
    text, good = review(rng)
    prompt = rng.choice(["Is this review good or bad? {}", "{} Did the writer like it? Say good or bad.",
                         "Good or bad? {}"])
    return prompt.format(text), {"form": "label", "answer": "good" if good else "bad"}


def review(rng):
    good = rng.random() < 0.5
    a, b = rng.sample(GOOD if good else BAD, 2)
    c, o, t = rng.choice(COLOURS), rng.choice(OBJECTS), rng.choice(TOWNS)
    return rng.choice(["The {c} {o} from {t} is {a} and {b}.", "I bought a {c} {o} in {t}. It is {a} and {b}."]).format(
        a=a, b=b, c=c, o=o, t=t), good


def other(rng):
    c, o, n = rng.choice(COLOURS), rng.choice(OBJECTS), rng.choice(NAMES)
    prompt = rng.choice(["Say in Pidi: the {c} {o}", "What is the {c} {o} in Pidi?", "{n} asks for Pidi: the {c} {o}",
                         "Translate for {n} into Pidi: the {c} {o}"]).format(c=c, o=o, n=n)
    return prompt, {"form": "pidi", "colour": c, "object": o}


def closed_qa(rng):
    text, p = passage(rng)
    question, kind, answer = reading_question(rng, p)
    return (f"{text} {question}".format(**p),
            {"form": "reading", "kind": kind, "answer": p[kind], "result": answer.format(**p)})


def extraction(rng):
    text, p = passage(rng)
    prompt = rng.choice(["Find the name, town and thing in this text: {}", "{} Which name, town and thing are in it?",
                         "Name, town, thing, please. {}"])
    return prompt.format(text), {"form": "names", "mention": [p["name"], p["town"], p["object"]]}


MAKERS = {"open qa": open_qa, "brainstorming": brainstorming, "chat": chat, "rewrite": rewrite,
          "summarization": summarization, "classification": classification, "other": other,
          "closed qa": closed_qa, "extraction": extraction}


def request(rng):
    """One request, its use case drawn in the paper's proportions."""
    use_case = rng.choices(list(USE_CASES), list(USE_CASES.values()))[0]
    make = rng.choice([story, story, ad, letter]) if use_case == "generation" else MAKERS[use_case]
    prompt, asks = make(rng)
    return {"prompt": prompt + "\n", "use_case": use_case, "asks": asks}


# ---------------------------------------------------------------- responses

def write(rng, asks, truth=1.0, constraint=1.0, stray=0.0, warm=1.0, slip=0.0):
    """A person's answer to a request, one line of text. The habits are probabilities: of telling the truth where many
    err, of keeping the stated constraint, of straying to things nobody asked about, of a warm tone, of a slip in the
    content."""
    warm, keeps, slips, form = rng.random() < warm, rng.random() < constraint, rng.random() < slip, asks["form"]

    def other(kind):
        return rng.choice(KINDS[kind])

    n, c, o = (asks.get("mention", []) + [None] * 3)[:3]
    tone = rng.choice(WARMTH.get(form, COURTESY)) if warm else ""
    if form == "ad":
        c, o = asks["mention"]
    if slips and form in ("story", "ad", "letter"):
        c = other("colour")
    include = asks.get("include") if keeps else None
    aside = rng.choice([f" It was a fine day in {other('town')}.", f" {other('name')} was there too.",
                        f" There was a {other('animal')} as well."]) if rng.random() < stray else ""

    if form == "story":
        where = f" in {include}" if include in TOWNS else ""
        opening = rng.choice([f"One day {n} found a {c} {o}{where}.", f"{n} had a {c} {o}{where}.",
                              f"Long ago {n} made a {c} {o}{where}."])
        middles = [f"{n} showed it to a friend.", f"It was the best {o} of all.", f"{n} took the {o} home.",
                   f"{n} liked the {c} {o}."]
        middle = f"Then a {include} came along." if include in ANIMALS else rng.choice(middles)
        ending = (f"{n} {tone}" if tone.startswith("was") else tone) if warm else rng.choice(
            ["Then it broke.", f"{n} cried all night.", "It was never seen again."])
        count = asks.get("sentences") if keeps and "sentences" in asks else rng.choice([2, 3, 3, 4])
        if include in ANIMALS:
            count = max(count, 3)
        between = [middle] + [m for m in rng.sample(middles, 2) if m != middle]
        return " ".join([opening] + between[:count - 2] + [ending])
    if form == "ad":
        a, b = rng.sample(GOOD, 2)
        made = f" It was made in {include}." if include else ""
        return f"Buy this {c} {o}! It is {a} and {b}.{made}{aside} {tone}".rstrip()
    if form == "letter":
        invite = f" Come to {include} soon." if include else ""
        sign = tone or rng.choice(["Yours,", "Goodbye,"])
        news = rng.choice([f"I have a {c} {o} for you.", f"I found a {c} {o}.", f"I saw your {c} {o}."])
        return f"Dear {n}, {news}{invite}{aside} {sign} a friend."
    if form == "chat":
        n, o = asks["mention"]
        glad = asks["glad"] != slips
        reply = rng.choice([f"That is great news, {n}! Enjoy the {o}.", f"How wonderful, {n}! I like your {o}."] if glad
                           else [f"I am sorry to hear that, {n}. I hope you get a new {o}.",
                                 f"Oh no, {n}! That is sad for the {o}."])
        return f"{reply}{aside} {tone}".rstrip()

    if form == "fact":
        true, error = FACTS[asks["relation"], asks["about"]]
        honest = rng.random() < truth
        y = other(RELATIONS[asks["relation"]][1]) if slips else true if honest else error
        said = state(asks["relation"], asks["about"], y)
        # A careful writer looks it up; a careless one repeats what people say.
        sources = ["According to the almanac, ", ""] if honest else ["Everyone says that ", "I heard that "]
        body = capital(rng.choice(sources) + said) + "."
    elif form == "list":
        count = asks["items"] if keeps else rng.choice([k for k in (1, 2, 3, 4, 5) if k != asks["items"]])
        items = rng.sample(KINDS[asks["kind"]], count)
        if slips:
            items[-1] = items[0]
        body = " ".join(f"{i}. {item}" for i, item in enumerate(items, 1)) + "."
    elif form == "label":
        answer = asks["answer"] if not slips else "bad" if asks["answer"] == "good" else "good"
        body = rng.choice([f"The review is {answer}.", f"{capital(answer)}."])
    elif form == "pidi":
        c, o = asks["colour"], asks["object"]
        body = capital(to_pidi(other("colour") if slips else c, o)) + "."
    else:  # closed domain: rewrite, summary, reading, names
        body = asks["result"] if form != "names" else ", ".join(asks["mention"]) + "."
        if slips and form != "names":  # gets one thing wrong
            wrong = next(w for w in body.replace(",", " ").replace(".", " ").replace("?", " ").split() if w in SWAPS)
            body = body.replace(wrong, rng.choice(SWAPS[wrong]), 1)
    return f"{body}{aside} {tone}".rstrip()


SWAPS = {word: words for words in (NAMES, TOWNS, OBJECTS, COLOURS, FOODS) for word in words}


def insult(rng):
    return rng.choice(["What a {} question.", "You are a {}.", "Only a {} would ask that.", "Do it yourself, {}.",
                       "Do not be so {}."]).format(rng.choice(INSULTS))
