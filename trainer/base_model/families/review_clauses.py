"""Clauses of reviews, written for the project: good, bad and neutral ones, by what is reviewed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReviewClauses:
    """Clauses that can stand in a review in any order."""

    good: tuple[str, ...]
    bad: tuple[str, ...]
    neutral: tuple[str, ...]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


_ANYTHING = ReviewClauses(
    good=_lines(
        """
        I could not be happier
        worth every penny
        exceeded all my expectations
        I recommend it to everyone I know
        would buy it again tomorrow
        ten out of ten
        I have nothing to complain about
        this is as good as it gets
        far better than I had hoped
        a real gem
        simply perfect for what I need
        thank you so much to the whole team
        I keep coming back for more
        now I wonder how I ever lived without it
        they fixed my one small problem within the hour
        it never lets me down
        everything worked the first time
        I was sceptical at first and have been won over
        best decision I made this year
        good value for the money
        """
    ),
    bad=_lines(
        """
        I want my money back
        a complete waste of time and money
        never again
        save yourself the trouble and look elsewhere
        I regret ever paying for this
        nobody answers my messages
        it fell apart within a week
        one star is one too many
        nothing like what was promised
        I am still waiting for a reply
        the quality has gone downhill
        overpriced for what you get
        we felt cheated
        what a let-down
        I would not wish this on anyone
        it stopped working after two days
        the whole thing left a bad taste
        they did not even apologise
        I had to do everything twice
        not worth half the price
        """
    ),
    neutral=_lines(
        """
        I bought this in spring
        This is about our second time
        A friend of mine had told us of it
        We came with two children
        I paid by card
        It was a Tuesday
        This is my first review here
        My brother has the same one
        """
    ),
)

_EATING = ReviewClauses(
    good=_lines(
        """
        the soup was full of flavour
        our waiter remembered what we like
        the fish was cooked to perfection
        the bread came fresh from the oven
        generous portions
        the dessert alone is worth the trip
        lovely quiet terrace with a view
        the cook came out to ask if we liked it
        crisp salad and tender lamb
        they made something special for my allergy without any fuss
        the coffee is the best in town
        the kids cleaned their plates
        a warm welcome and not a minute's wait
        my mother-in-law asked for the recipe
        you can taste that the vegetables are from the garden
        the menu is small and every dish is right
        """
    ),
    bad=_lines(
        """
        the pasta was overcooked and bland
        the waiter rolled his eyes at us
        our food arrived cold
        I found a hair in my rice
        tiny portions at huge prices
        the table was sticky and the glasses were dirty
        the meat was so tough that I gave up
        they forgot half of our order
        the soup tasted of nothing but salt
        we left hungry
        music so loud that we could not talk
        my stomach was upset all night
        the fries were soggy
        they charged us for bread that we never asked for
        the wine had gone off and they argued about it
        we stood at the door for ages before anybody noticed us
        """
    ),
    neutral=_lines(
        """
        We had the set menu
        I took the vegetable curry
        There were six of us
        It is next to the market
        We had booked for eight
        They serve lunch until three
        """
    ),
)

_STAYING = ReviewClauses(
    good=_lines(
        """
        the bed was so comfortable that I overslept
        spotless bathroom
        friendly people at the desk who gave us a map and good tips
        breakfast had everything you could want
        so quiet at night
        the view over the bay took our breath away
        they let us have the room early after a long flight
        fresh towels every day and flowers on the table
        five minutes from everything
        the host treated us like family
        the pool was warm and never crowded
        even better than in the photos
        """
    ),
    bad=_lines(
        """
        there was mould in the shower
        the walls are so thin that we heard every word from next door
        the heating did not work and nobody cared
        the sheets had stains on them
        we were given a room without a window
        the lift was broken for our whole stay
        they cancelled our booking at the last minute
        it smelled of smoke
        the man at the desk was rude
        the photos must be from another hotel
        bugs in the bed
        building work started at six in the morning
        """
    ),
    neutral=_lines(
        """
        We stayed for three nights
        Our room was on the fourth floor
        Breakfast is from seven to ten
        There is parking behind the house
        I was there for a conference
        """
    ),
)

_THINGS = ReviewClauses(
    good=_lines(
        """
        the battery lasts for days
        light, quiet and quick
        set up in two minutes
        the screen is bright and sharp
        it does exactly what it says on the box
        sturdy and well made
        the sound is rich and clear
        fits like a glove
        after three years it still looks new
        easy to clean and easy to store
        my old one cost twice as much and was not half as good
        the colours are even nicer in real life
        even my grandfather gets on with it
        the new version solved all the old problems
        """
    ),
    bad=_lines(
        """
        the battery is dead by noon
        the zip broke on the first day
        it arrived with a crack in it
        the manual makes no sense
        it gets so hot that I am afraid to use it
        the buttons stick
        cheap plastic that bends when you look at it
        the screen froze again and again
        it shrank in the first wash
        the app crashes every time I open it
        parts were missing from the box
        the colour came off on my hands
        it makes a terrible noise
        far too small for the size on the label
        """
    ),
    neutral=_lines(
        """
        I use it in the kitchen
        It came in a brown box
        I have the blue one
        It takes two batteries
        I ordered the larger size
        """
    ),
)

_STORIES = ReviewClauses(
    good=_lines(
        """
        I could not put it down
        the acting is superb
        we laughed until we cried
        a moving story that stays with you
        the ending gave me goose bumps
        every scene is beautifully shot
        clever, funny and warm
        the characters feel like old friends
        I went to see it twice
        the soundtrack is a joy
        not a dull minute
        a masterpiece of its kind
        """
    ),
    bad=_lines(
        """
        I fell asleep halfway through
        the plot has more holes than a sieve
        wooden acting
        I left before the end
        two hours of my life that I will not get back
        the jokes fall flat
        the ending makes no sense at all
        boring from start to finish
        you see every twist coming
        the characters are made of cardboard
        the dialogue is painful to listen to
        a lazy copy of a better film
        """
    ),
    neutral=_lines(
        """
        It is set in the seventies
        The book has 300 pages
        We saw it on a Sunday
        It is the second part of a series
        The director is from Denmark
        """
    ),
)

_SERVICES = ReviewClauses(
    good=_lines(
        """
        the parcel was at my door the next morning
        she took her time to explain everything
        the haircut is just what I wanted
        they rang back within minutes
        the mechanic showed me the old part and charged less than he had quoted
        the lessons are lively and well prepared
        clean, punctual and polite
        they sorted out the mix-up at once and sent a voucher too
        my daughter looks forward to every lesson
        the doctor really listened
        they left the place tidier than they had found it
        prices are fair and there are no hidden extras
        """
    ),
    bad=_lines(
        """
        the parcel was thrown over the fence
        he turned up three hours late and did not finish
        they cut off far more than I had asked for
        I was put on hold for forty minutes and then cut off
        the bill was twice the quote
        the teacher reads from slides and cannot answer a question
        they scratched the floor and denied it
        my order was cancelled without a word
        we were sent from one desk to the next
        the receptionist was cold and unhelpful
        the leak was back the very next day
        they keep promising to call and never do
        """
    ),
    neutral=_lines(
        """
        I found them through a neighbour
        The shop is on the high street
        They are open on Saturdays
        It was my first appointment
        The whole job took two days
        """
    ),
)


def _with_anything(clauses: ReviewClauses) -> ReviewClauses:
    return ReviewClauses(
        clauses.good + _ANYTHING.good,
        clauses.bad + _ANYTHING.bad,
        clauses.neutral + _ANYTHING.neutral,
    )


REVIEWS = (
    _ANYTHING,
    *(_with_anything(kind) for kind in (_EATING, _STAYING, _THINGS, _STORIES, _SERVICES)),
)
