"""Tests of the cache, and the tiny model that other tests of whole runs share with them."""
