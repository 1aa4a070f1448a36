"""Copy a part of the text: a word, a field of a record, a role in an event, a slot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from trainer.base_model.corpus import Corpus
from trainer.base_model.families.task import TrainingTask, sentences


def copy_tasks(corpus: Corpus, rng: Random, most_rows: int) -> Iterator[TrainingTask]:
    """Copy a part of the text: by place, by neighbour, by kind, whole."""
    texts = sentences(corpus)

    def clean(text: str) -> list[str]:
        return re.findall(r"[A-Za-z]+|\d+", text)

    places = {"first": 0, "second": 1, "third": 2, "last": -1, "last but one": -2}
    for said, place in places.items():
        rows = [(t, clean(t)[place]) for t in rng.sample(texts, most_rows) if len(clean(t)) > 4]
        yield TrainingTask(f"{said}_word", "copying", f"Copy the {said} word of the text.", rows)
    rows = [(t, max(clean(t), key=len)) for t in rng.sample(texts, most_rows) if clean(t)]
    yield TrainingTask("longest_word", "copying", "Copy the longest word of the text.", rows)
    rows = [(text, text) for text in rng.sample(texts, most_rows) if len(text.split()) < 20]
    yield TrainingTask("whole_text", "copying", "Copy the text.", rows)
    rows = [
        (text, found.group())
        for text in [*texts, *(text for text, _ in corpus.requests)]
        if (found := re.search(r"\b\d+\b", text)) and len(re.findall(r"\b\d+\b", text)) == 1
    ]
    yield TrainingTask("number", "copying", "Copy the number in the text.", rows)
    rows = [
        (text, names[0])
        for _, text, _ in corpus.splits
        if len(names := re.findall(r"(?<=[a-z] )[A-Z][a-z]+(?: [A-Z][a-z]+)*", text)) == 1
    ]
    yield TrainingTask("only_name", "copying", "Copy the name that the text mentions.", rows)
    rows = [
        (text, names[-1])
        for text, *_ in corpus.splits
        if len(names := re.findall(r"(?<=[a-z] )[A-Z][a-z]+(?: [A-Z][a-z]+)*", text)) >= 2
    ]
    yield TrainingTask("last_name", "copying", "Copy the last name in the text.", rows)
    for said, offset in (("after", 1), ("before", -1)):
        rows = []
        for text in rng.sample(texts, most_rows):
            if len(tokens := clean(text)) > 6:
                place = rng.randrange(1, len(tokens) - 1)
                if tokens.count(tokens[place]) == 1:
                    rows.append((f"word: {tokens[place]}\n{text}", tokens[place + offset]))
        about = f"Copy the word {said} the given word."
        yield TrainingTask(f"word_{said}", "copying", about, rows)
    rows = []
    for text in rng.sample(texts, most_rows):
        if len(tokens := text.split()) > 10:
            start = rng.randrange(1, len(tokens) - 5)
            end = start + rng.randrange(1, 5)
            hole = [*tokens[:start], '"', *tokens[start:end], '"', *tokens[end:]]
            rows.append((" ".join(hole), " ".join(tokens[start:end])))
    yield TrainingTask("quoted_words", "copying", "Copy the words between quotation marks.", rows)


_PEOPLE = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Ella",
    "Frank",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Kate",
    "Liam",
    "Maria",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Victor",
    "Wendy",
    "Yusuf",
    "Zoe",
    "Amir",
    "Chloe",
    "Diego",
    "Emma",
    "Hugo",
    "Ines",
    "Jonas",
    "Lena",
    "Marco",
    "Nina",
    "Omar",
]
_THINGS = [
    "book",
    "lamp",
    "bicycle",
    "guitar",
    "ticket",
    "coat",
    "parcel",
    "key",
    "camera",
    "chair",
    "letter",
    "jacket",
    "phone",
    "basket",
    "drum",
    "ladder",
    "clock",
    "carpet",
    "mirror",
    "bottle",
    "blanket",
    "hammer",
    "puzzle",
    "painting",
    "notebook",
    "kettle",
]
_EVENTS = (
    ("{who} gave the {what} to {other} in {place} on {day}.", "who what other place day"),
    ("On {day} {who} met {other} in {place}, not in {wrong}.", "day who other place wrong"),
    ("{who} moved from {wrong} to {place} with {other}.", "who wrong place other"),
    ("The {what} was sent by {who} to {other}, who lives in {place}.", "what who other place"),
    ("{other} lost the {what} in {place}; {who} found it on {day}.", "other what place who day"),
    ("We asked {other} first, but it was {who} who paid for the {what}.", "other who what"),
    ("{who} used to work in {wrong}. Since {day} the office is in {place}.", "who wrong day place"),
    (
        "Not the {instead} but the {what} broke when {who} visited {place}.",
        "instead what who place",
    ),
)
_DAYS = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "January",
    "March",
    "June",
]
_FIELDS = [
    "name",
    "colour",
    "town",
    "price",
    "owner",
    "size",
    "code",
    "team",
    "month",
    "material",
    "rank",
    "status",
    "maker",
]


def record_tasks(corpus: Corpus, rng: Random, most_rows: int) -> Iterator[TrainingTask]:
    """Read one field out of a record, or one role out of a made-up event with distractors."""
    capitals = corpus.instruction_tasks.get("task1146_country_capital")
    places = [city for _, city in capitals.rows if city.isalpha()] if capitals else list(_DAYS)
    values = sorted({word for text, _ in corpus.requests for word in text.split() if len(word) > 3})
    for place in range(3):
        rows = []
        for _ in range(most_rows):
            fields = rng.sample(_FIELDS, rng.randrange(2, 6))
            held = {field: rng.choice(values) for field in fields}
            asked = fields[min(place, len(fields) - 1)]
            shown = list(held.items())
            rng.shuffle(shown)
            record = rng.choice((", ", "; ", "\n")).join(f"{k}: {v}" for k, v in shown)
            rows.append((f"{asked}?\n{record}", held[asked]))
        about = "Copy the value of the field that is asked for."
        yield TrainingTask(f"record_{place}", "copying", about, rows)
    questions = {
        "who": "Who did it?",
        "other": "Who is the other person?",
        "what": "Which thing is it about?",
        "place": "In which town is it?",
        "day": "When was it?",
    }
    for role, question in questions.items():
        usable = [event for event, roles in _EVENTS if role in roles.split()]
        for form in range(2):
            rows = []
            for _ in range(most_rows // 2):
                who, other = rng.sample(_PEOPLE, 2)
                what, instead = rng.sample(_THINGS, 2)
                here, wrong = rng.sample(places, 2)
                held = {"who": who, "other": other, "what": what, "instead": instead}
                held |= {"place": here, "wrong": wrong, "day": rng.choice(_DAYS)}
                text = rng.choice(usable).format(**held)
                extra = rng.choice(corpus.splits)[2] if form else ""
                rows.append((f"{text} {extra}".strip(), held[role]))
            yield TrainingTask(f"event_{role}_{form}", "copying", question, rows)


_SLOTS = {
    "party_size": (
        r"\bfor (\w+) people\b",
        "BookRestaurant",
        "For how many people is the table?",
    ),
    "restaurant_place": (
        r"(?<! \d) in ([a-z ]{4,30})$",
        "BookRestaurant",
        "In which place is the restaurant?",
    ),
    "weather_place": (
        r" (?:in|for) ([a-z ]{4,30}?)(?: (?:at|on|in|for) .*)?$",
        "GetWeather",
        "For which place is it?",
    ),
    "rating": (
        r"\b(\w+) (?:out of \w+|stars|points)\b",
        "RateBook",
        "How many points are given?",
    ),
    "best_rating": (
        r"\bout of (\w+)\b",
        "RateBook",
        "Out of how many points?",
    ),
    "rated_book": (
        r"^(?:rate|give) (?:the )?(.{4,40}?)(?: an?)? \w+ (?:out of|stars|points)",
        "RateBook",
        "Which book is rated?",
    ),
    "playlist": (
        r"\b(?:to|onto|on) (?:my |the )?(.{3,30}?) playlist\b",
        "AddToPlaylist",
        "To which playlist is it added?",
    ),
    "added_music": (
        r"^add (.{3,40}?) (?:to|onto) (?:my|the)\b",
        "AddToPlaylist",
        "What is added?",
    ),
    "artist": (
        r" by ([a-z ]{4,30}?)(?: on .*)?$",
        "PlayMusic",
        "Which artist is it by?",
    ),
    "music_service": (
        r" (?:on|using|from|through) ([a-z ]{4,20})$",
        "PlayMusic",
        "On which service is it played?",
    ),
    "wanted_work": (
        r"\b(?:called|named|titled) (.{3,40})$",
        "SearchCreativeWork",
        "What is the work called?",
    ),
    "film": (
        r"\b(?:see|watch) (.{3,40}?)(?: at .*)?$",
        "SearchScreeningEvent",
        "Which film is it?",
    ),
}
"""A pattern whose group is the slot, the intent whose texts it is tried on, and the question."""


def slot_tasks(corpus: Corpus) -> Iterator[TrainingTask]:
    """Copy a detail out of a request: Snips, by patterns of our own."""
    for name, (pattern, intent, question) in _SLOTS.items():
        rows = [
            (text, found.group(1).strip())
            for text, label in corpus.requests
            if label == intent and (found := re.search(pattern, text))
        ]
        yield TrainingTask(f"slot_{name}", "copying", question, rows)
