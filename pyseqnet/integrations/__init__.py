"""Our layers and functions inside other people's libraries; each module needs its library, which pyseqnet does not
install."""
