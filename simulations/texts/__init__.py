"""Real text for the data owners (Shakespeare by genre) and public text of another domain (the King James Bible).

For the small model the Bible alone is both: some books are public, the others belong to four data owners.

python -m simulations.texts            # fetch both into the cache and write the quickstart's files there
                                       # (an installation step, the only one with a network)
python -m simulations.texts FOLDER     # write the files of the data owners, the test file and the public text
"""

from simulations.texts.books import (
    BOOK_OWNERS,
    book_partition,
    books,
    books_folder,
    public_books,
    write_book_files,
)
from simulations.texts.choices import CHOICES, choices_folder, write_choice_files
from simulations.texts.corpus import bible, shakespeare
from simulations.texts.kinds import KINDS, kinds_folder, labelled_passages, write_kind_files
from simulations.texts.owners import OWNERS, Share, partition, passages, quickstart_folder, write_owner_files
from simulations.texts.store import fetch, texts_folder

__all__ = [
    "BOOK_OWNERS",
    "CHOICES",
    "KINDS",
    "OWNERS",
    "Share",
    "bible",
    "book_partition",
    "books",
    "books_folder",
    "choices_folder",
    "fetch",
    "kinds_folder",
    "labelled_passages",
    "partition",
    "passages",
    "public_books",
    "quickstart_folder",
    "shakespeare",
    "texts_folder",
    "write_book_files",
    "write_choice_files",
    "write_kind_files",
    "write_owner_files",
]
