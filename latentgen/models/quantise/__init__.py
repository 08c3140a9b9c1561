"""Weights held in fewer bits than the network computes with: how each is packed (`ways`), as a file has it (`packed`), and in a network (`held`)."""
