"""Many pictures by one call: sheets, films and variations, each of them ordinary requests in a row (`series`)."""
