"""Four data owners tune a language model that none of them ever holds: a Flower App in three small files."""
