"""Noun phrases of a caption and what each speaks of, by rules: closed word classes, a vocabulary of clothes, and endings."""

import re
from dataclasses import dataclass


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that end a phrase, and words that begin one.
_DETERMINERS = _words(
    "a an the this that these those his her their its my your our some any another each no one two three"
)
_PREPOSITIONS = _words(
    "in on at of with without over under underneath beneath above below behind beside besides by near next around across "
    "along against through into onto from to towards toward up down off out inside outside between beyond during for as "
    "like than about beside atop alongside past within per via"
)
_CONJUNCTIONS = _words(
    "and or but while when where who whom whose which that because if so then also plus nor both either"
)
_PRONOUNS = _words(
    "he she it they him them i you we us himself herself itself themselves there what someone hers theirs"
)
_VERBS = _words(
    "is are was were be been being am has have had do does did can could will would may might must should seems seem "
    "appears appear looks look wears wear wore worn carries carry carried holds hold held walks walk walked stands stand "
    "stood sits sit sat runs run ran rides ride rode pulls pull pulled pushes push pushed uses use used shows show shown "
    "showing goes go went gone comes come came faces has gets get got makes make made takes take took features feature "
    "featuring consists consist dressed seen pictured captured taken depicts depict depicted positioned located visible "
    "paired matched slung tied tucked rolled draped pulled hanging hangs hang rests rest leans lean looking wearing walking "
    "standing holding carrying riding pulling pushing sitting talking facing going having using dragging crossing moving "
    "posing smiling stepping heading making waiting turning leaning appearing consisting including reaching strolling "
    "checking texting speaking listening resting covering reaches reach covers cover falls fall goes extends extend "
    "reveals reveal displays display kept keeps keep put puts combined accompanied"
)
_ADVERBS = _words(
    "very quite rather too not also just only almost nearly slightly mostly maybe perhaps probably possibly likely "
    "currently away forward forwards backward backwards ahead together apart alone here now again still even well close"
)
_ADJECTIVES = _words(
    "black white gray grey red blue green yellow orange purple pink brown beige tan cream navy maroon teal turquoise khaki "
    "gold golden silver violet burgundy magenta cyan olive charcoal ivory crimson lavender peach coral mint bronze rose "
    "light dark bright pale deep dull neon pastel colored coloured colorful colourful multicolored multicoloured "
    "light-colored dark-colored brightly lightly darkly color colour "
    "long short medium mid shoulder-length knee-length ankle-length full-length waist-length large big small little tiny "
    "tall thin slim slender fat heavy heavyset wide narrow loose tight baggy skinny fitted oversized cropped high low full "
    "half mid-length medium-length average young old older elderly middle-aged adult teenage asian african caucasian "
    "chinese indian american bald curly straight wavy messy neat blond blonde brunette ginger dyed shaved bearded "
    "plain solid striped stripey checked checkered plaid dotted polka-dot patterned printed floral flowery flowered "
    "camouflage camo graphic spotted tie-dyed embroidered ripped torn faded washed distressed ruffled pleated quilted knit "
    "knitted woolen woollen wool leather denim cotton silk lace suede fur furry fluffy puffy canvas mesh plastic metal "
    "nylon corduroy velvet satin linen fleece sheer transparent shiny glossy "
    "casual formal sporty athletic sports sport running tennis basketball baseball hooded collared zipped zip-up button-up "
    "button-down long-sleeved short-sleeved long-sleeve short-sleeve sleeveless v-neck crew-neck round-neck turtleneck "
    "off-shoulder open open-toed closed high-heeled heeled flat lace-up slip-on wide-brimmed rimmed black-rimmed rolling "
    "rolled-up crossbody messenger different similar same other matching contrasting nice simple modern traditional new "
    "stylish trendy fashionable blurry busy empty crowded paved concrete wooden brick glass urban sunny outdoor indoor "
    "public right left front rear upper lower several many few single double multiple various unknown certain "
    "designer winter summer spring gym school business work military police"
)
# Nouns that endings or the lists above would take for something else.
_NOUNS = _words(
    "clothing building earring earrings ring rings legging leggings stocking stockings lighting lettering parking painting "
    "railing flooring morning evening crossing ceiling awning bedding opening lining marking markings writing string belonging "
    "belongings sling wing king swimming body lady family belly jelly dress dresses glasses sunglasses eyeglasses "
    "suit suits tie ties top tops watch watches scarf"
)
# "front", "back" and the like locate; pictures, styles and colours are no things to be found in the image.
_PLACELESS = _words(
    "picture photo photograph image shot view camera scene style fashion color colour colors colours way kind type sort "
    "front back side sides rear middle center centre left right direction distance background "
    "foreground length size front-view pose position motion step steps lot bit number time day night "
    "look appearance something anything thing things everything nothing age height build frame stature "
    "viewer contrast combination addition close-up closeup"
)
_MADE_OF = _words("pair pairs set piece bunch couple")  # "a pair of blue jeans" is one phrase
_PATTERNS = _words(
    "stripe stripes dot dots check checks pattern patterns print prints logo logos design designs flower flowers letters "
    "lettering writing text graphic graphics emblem trim lining buttons polka spots"
)

_PERSON = _words(
    "man woman person people boy girl male female guy lady gentleman pedestrian child kid teenager adult student player "
    "men women individual human toddler youth worker officer soldier businessman businesswoman model rider cyclist "
    "teen baby senior guard tourist traveler commuter jogger walker"
)
_KINDS = {
    "person": _PERSON,
    "hair": _words(
        "hair ponytail bun braid braids bangs beard mustache moustache hairstyle haircut pigtails dreadlocks"
    ),
    "hat": _words("hat cap beanie helmet hood headband bandana headscarf turban hijab beret visor headphones headset"),
    "full": _words(
        "dress gown suit jumpsuit uniform overalls romper robe overall coverall tracksuit pajamas sari kimono abaya burqa"
    ),
    "upper": _words(
        "shirt shirts t-shirt tshirt tee blouse sweater sweatshirt hoodie jacket coat vest cardigan pullover jumper polo "
        "blazer tank-top undershirt overcoat parka raincoat windbreaker tunic camisole turtleneck poncho jersey hoody "
        "top tops waistcoat trenchcoat shawl cape"
    ),
    "lower": _words(
        "pants trousers jeans shorts skirt leggings slacks sweatpants tights capris khakis bottoms pant chinos joggers "
        "culottes miniskirt stockings jean"
    ),
    "shoes": _words(
        "shoes shoe sneakers sneaker boots boot sandals sandal heels trainers flats slippers flip-flops loafers socks sock "
        "footwear flip-flop pumps moccasins clogs slipper"
    ),
    "bag": _words(
        "bag backpack handbag purse suitcase rucksack satchel luggage briefcase tote wallet pouch case bags backpacks "
        "knapsack trolley shopping-bag fanny-pack pack clutch"
    ),
    "accessory": _words(
        "glasses sunglasses eyeglasses watch belt scarf tie necklace bracelet earrings earring gloves mask umbrella "
        "phone cellphone smartphone book bottle cup wristband headphone lanyard badge camera bowtie ring gloves glove "
        "wristwatch paper papers folder box cane stroller bicycle bike skateboard scooter"
    ),
    "body": _words(
        "body face head arm arms hand hands leg legs foot feet shoulder shoulders neck waist chest skin eyes knees"
    ),
    "outfit": _words("outfit clothes clothing attire garment garments apparel ensemble wear"),
}
_KIND_OF = {noun: kind for kind, nouns in _KINDS.items() for noun in nouns}
KINDS = (*_KINDS, "other")

_PATTERNED = ("upper", "lower", "full", "shoes", "bag", "hat")
_HAIR_HELD = _words(
    "in into up back tied pulled gathered put worn kept styled"
)  # "black hair tied back in a ponytail"
_PHRASAL = {("on", "top", "of"), ("in", "front", "of"), ("close", "up", "of"), ("in", "addition", "to")}
_ABSENT = _words("no without not never")

_TOKEN = re.compile(r"[A-Za-z0-9]+(?:[-'’][A-Za-z0-9]+)*|[^\sA-Za-z0-9]")
_ADJECTIVE_ENDINGS = (
    "-colored",
    "-coloured",
    "-sleeved",
    "-sleeve",
    "-length",
    "-toed",
    "-heeled",
    "-rimmed",
    "-necked",
)
_ADJECTIVE_ENDINGS += ("-brimmed", "-aged", "-style", "-like", "-fitting", "-neck", "ish", "ous", "ful", "less", "-up")

_MODIFYING = _ADJECTIVES | _KIND_OF.keys()
_ENDING_PHRASES = (_DETERMINERS | _PREPOSITIONS | _CONJUNCTIONS | _PRONOUNS | _VERBS | _ADVERBS) - _ADJECTIVES


@dataclass(frozen=True)
class NounPhrase:
    """
    A phrase of a caption.

    Attributes:
        text: as it stands in the caption, spaces evened out.
        start, end: characters of the caption.
        head: its last noun in lower case, which says what it is.
        kind: `person`, `hair`, `hat`, `upper`, `lower`, `full`, `shoes`, `bag`, `accessory`, `body`, `outfit` or `other`.
        modifiers: words that say more of the head.
    """

    text: str
    start: int
    end: int
    head: str
    kind: str
    modifiers: int


@dataclass(frozen=True)
class _Token:
    word: str  # lower case
    start: int
    end: int
    tag: str


def find_noun_phrases(caption: str) -> list[NounPhrase]:
    """
    Finds the things that a caption names, in its order, each wording once.

    A phrase is a determiner, modifiers and nouns: "a black and white striped shirt", "red running shoes". What a phrase
    is made of, its pattern and how hair is worn belong to it: "a pair of blue jeans", "a shirt with white stripes", "brown
    hair in a ponytail". None are a bare adjective, a pronoun, a word for the picture itself ("a photo of", "in the
    background"), what the caption says is not there ("no bag"), and parts of the body that only tell where something is
    ("over one shoulder"). Words that no list knows count as nouns.
    """
    tokens = _tag(caption)
    phrases, seen, place = [], set(), 0
    while place < len(tokens):
        end = _end_of_phrase(tokens, place)
        if end is None:
            place += 1
            continue
        phrase = _make_phrase(caption, tokens[place:end])
        place, first = end, place
        if phrase is None or _is_absent(tokens, first) or _is_place(tokens, first, phrase):
            continue
        if phrase.text.lower() not in seen:
            seen.add(phrase.text.lower())
            phrases.append(phrase)
    return phrases


def specificity(phrase: NounPhrase) -> tuple[int, int]:
    """How much a phrase says, larger for more: a known garment over an "outfit" and over the person, then its modifiers."""
    ranks = {"person": 0, "outfit": 1, "other": 2, "body": 2}
    return ranks.get(phrase.kind, 3), phrase.modifiers


# Words -> tags: D determiner, J modifier, N noun, C "and", P preposition, X anything that ends a phrase


def _tag(caption: str) -> list[_Token]:
    found = list(_TOKEN.finditer(caption))
    words = [match.group().lower().replace("’", "'") for match in found]
    tags: list[str] = []
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        tags.append(_tag_word(word, tags[-1] if tags else "X", following))
    for place in range(len(words) - 2):
        if tuple(words[place : place + 3]) in _PHRASAL:
            tags[place : place + 3] = "PPP"
    return [_Token(word, match.start(), match.end(), tag) for word, match, tag in zip(words, found, tags, strict=True)]


def _tag_word(word: str, before: str, following: str) -> str:
    if not word[0].isalnum():
        return "X"
    if word in ("and", "&"):
        return "C"
    if word in _DETERMINERS and not (word == "that" and before == "N"):
        return "D"
    if word in _PREPOSITIONS:
        return "P"
    if word in _CONJUNCTIONS or word in _PRONOUNS:
        return "X"
    inside = before in "DJC"
    if word in _NOUNS:
        return "N"
    if word in _VERBS and not (inside and word in _MODIFYING):
        return "X"
    if word in _ADVERBS:
        return "X"
    if word in _ADJECTIVES or word.endswith(_ADJECTIVE_ENDINGS) or word.isdecimal():
        return "N" if (word in _KIND_OF or word in _PLACELESS) and not _continues(following) else "J"
    if word in _KIND_OF or word in _PLACELESS or word in _PATTERNS | _MADE_OF:
        return "N"
    if word.endswith("ly"):
        return "J" if inside or _continues(following) else "X"
    if word.endswith("ing"):
        return "J" if inside and _continues(following) else "X"
    if word.endswith("ed") and len(word) > 4:
        return "J" if _continues(following) else "X"
    return "N"


def _continues(following: str) -> bool:
    """Whether a word can be followed by more of the same phrase."""
    if not following or not following[0].isalnum():
        return False
    return following not in _ENDING_PHRASES


def _end_of_phrase(tokens: list[_Token], start: int) -> int | None:
    """End of the phrase that begins at a token, None where none does."""
    place = start + (tokens[start].tag == "D")
    end = None
    while place < len(tokens):
        token = tokens[place]
        if token.tag == "N" or (token.tag == "J" and end is None):
            end = place + 1 if token.tag == "N" else end
        elif token.tag == "J" and tokens[place - 1].tag == "N" and _noun_follows(tokens, place):
            pass  # a noun that modifies: "sport running shoes"
        elif not (token.tag in "CX" and token.word in ("and", "&", ",") and _joins_modifiers(tokens, place, end)):
            break
        place += 1
    if end is None:
        return None
    return _with_complement(tokens, start, end)


def _noun_follows(tokens: list[_Token], place: int) -> bool:
    while place < len(tokens) and tokens[place].tag == "J":
        place += 1
    return place < len(tokens) and tokens[place].tag == "N"


def _joins_modifiers(tokens: list[_Token], place: int, end: int | None) -> bool:
    """Whether an "and" or comma stands between modifiers of one noun: "black and white shoes", "short, dark hair"."""
    return (
        end is None and tokens[place - 1].tag == "J" and _noun_follows(tokens, place + 1) and place + 1 < len(tokens)
    )


def _with_complement(tokens: list[_Token], start: int, end: int) -> int:
    """Takes in "of blue jeans" after "a pair", "with white stripes" after a garment, "tied in a ponytail" after hair."""
    head, place = tokens[end - 1].word, end
    if _KIND_OF.get(head) == "hair":
        while place < len(tokens) and tokens[place].word in _HAIR_HELD:
            place += 1
        inner = _end_of_phrase(tokens, place) if place > end and place < len(tokens) else None
        return inner if inner is not None and _KIND_OF.get(tokens[inner - 1].word) == "hair" else end
    if place + 1 < len(tokens) and tokens[place].word in ("of", "with"):
        inner = _end_of_phrase(tokens, place + 1)
        if inner is not None and tokens[place].word == "of" and head in _MADE_OF:
            return inner
        if inner is not None and _KIND_OF.get(head) in _PATTERNED and tokens[inner - 1].word in _PATTERNS:
            return inner
    return end


def _is_absent(tokens: list[_Token], start: int) -> bool:
    """Whether a phrase names what is not there: "no bag", "without a hat"."""
    return tokens[start].word in _ABSENT or (start > 0 and tokens[start - 1].word in _ABSENT)


def _is_place(tokens: list[_Token], start: int, phrase: NounPhrase) -> bool:
    """Whether a part of the body tells only where something is: "over one shoulder"; not so "with a bald head"."""
    if phrase.kind != "body" or start == 0 or tokens[start - 1].tag != "P":
        return False
    return tokens[start - 1].word != "with" or phrase.modifiers == 0


def _make_phrase(caption: str, tokens: list[_Token]) -> NounPhrase | None:
    start, end = tokens[0].start, tokens[-1].end
    base = tokens
    for place, token in enumerate(tokens):  # the head stands behind "a pair of" and before every other complement
        if token.tag not in "DJNC" and token.word != ",":
            base = tokens[place + 1 :] if token.word == "of" else tokens[:place]
            break
    head = base[-1].word
    if head in _PLACELESS or head in _MADE_OF:
        return None
    modifiers = sum(token.tag in "JN" for token in tokens) - 1
    return NounPhrase(" ".join(caption[start:end].split()), start, end, head, _KIND_OF.get(head, "other"), modifiers)
