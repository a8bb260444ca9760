"""All that Flower messages carry: record names, settings, codecs, the files of a bundle, reasons for refusal."""
