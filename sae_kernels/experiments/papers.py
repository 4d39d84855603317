"""The figures of the paper that the grid repeats: relative nDCG@20 of TopK SAEs on its data sets (Spišák et al. 2026).

As recomputed from the result files of its public code, one seed, test users.
"""

from dataclasses import dataclass

K = (8, 16, 32, 64)


@dataclass(frozen=True)
class Published:
    """One line of the paper's grid: kept[i] is nDCG@20 with the SAE over nDCG@20 without it, at K[i]."""

    data: str
    model: str
    d: int
    loss: str
    width: int
    kept: tuple[float, ...]


# data, model, d, loss, width; then k = 8, 16, 32, 64
_LINES = """
ML-25M elsa 512 cosine 2  .919 .955 .977 .991
ML-25M elsa 512 cosine 4  .921 .955 .977 .988
ML-25M elsa 512 cosine 8  .919 .954 .973 .988
ML-25M elsa 512 l2 2  .882 .919 .935 .952
ML-25M elsa 512 l2 4  .890 .920 .944 .961
ML-25M elsa 512 l2 8  .885 .920 .944 .958
ML-25M elsa 1024 cosine 2  .901 .935 .965 .984
ML-25M elsa 1024 cosine 4  .907 .935 .967 .984
ML-25M elsa 1024 cosine 8  .904 .938 .963 .980
ML-25M elsa 1024 l2 2  .876 .907 .938 .954
ML-25M elsa 1024 l2 4  .866 .909 .940 .961
ML-25M elsa 1024 l2 8  .869 .907 .942 .960
ML-25M elsa 2048 cosine 2  .889 .924 .952 .974
ML-25M elsa 2048 cosine 4  .890 .921 .952 .976
ML-25M elsa 2048 cosine 8  .890 .925 .954 .974
ML-25M elsa 2048 l2 2  .867 .910 .945 .964
ML-25M elsa 2048 l2 4  .862 .908 .939 .965
ML-25M elsa 2048 l2 8  .857 .904 .937 .966
ML-25M multvae 256 cosine 2  .769 .574 .531 .500
ML-25M multvae 256 cosine 4  .720 .581 .526 .506
ML-25M multvae 256 cosine 8  .755 .588 .526 .510
ML-25M multvae 256 l2 2  .611 .643 .663 .670
ML-25M multvae 256 l2 4  .614 .639 .660 .670
ML-25M multvae 256 l2 8  .615 .637 .656 .662
ML-25M multvae 512 cosine 2  .769 .687 .587 .536
ML-25M multvae 512 cosine 4  .785 .679 .589 .530
ML-25M multvae 512 cosine 8  .782 .674 .590 .525
ML-25M multvae 512 l2 2  .634 .663 .691 .706
ML-25M multvae 512 l2 4  .633 .667 .691 .709
ML-25M multvae 512 l2 8  .634 .666 .689 .712
ML-25M multvae 1024 cosine 2  .783 .700 .624 .585
ML-25M multvae 1024 cosine 4  .783 .700 .623 .593
ML-25M multvae 1024 cosine 8  .781 .697 .640 .595
ML-25M multvae 1024 l2 2  .669 .702 .734 .755
ML-25M multvae 1024 l2 4  .670 .706 .732 .759
ML-25M multvae 1024 l2 8  .670 .683 .734 .762
MSD elsa 512 cosine 2  .898 .914 .928 .948
MSD elsa 512 cosine 4  .935 .957 .966 .974
MSD elsa 512 cosine 8  .938 .969 .977 .982
MSD elsa 512 l2 2  .881 .896 .914 .935
MSD elsa 512 l2 4  .921 .941 .949 .957
MSD elsa 512 l2 8  .923 .952 .963 .966
MSD elsa 1024 cosine 2  .922 .946 .952 .960
MSD elsa 1024 cosine 4  .933 .965 .976 .981
MSD elsa 1024 cosine 8  .935 .967 .979 .984
MSD elsa 1024 l2 2  .892 .916 .923 .931
MSD elsa 1024 l2 4  .904 .939 .950 .954
MSD elsa 1024 l2 8  .908 .943 .956 .960
MSD elsa 2048 cosine 2  .908 .949 .966 .973
MSD elsa 2048 cosine 4  .912 .952 .972 .979
MSD elsa 2048 cosine 8  .916 .957 .974 .980
MSD elsa 2048 l2 2  .867 .917 .934 .935
MSD elsa 2048 l2 4  .870 .923 .947 .952
MSD elsa 2048 l2 8  .868 .923 .947 .956
MSD multvae 256 cosine 2  .383 .211 .204 .197
MSD multvae 256 cosine 4  .374 .213 .206 .198
MSD multvae 256 cosine 8  .360 .215 .207 .198
MSD multvae 256 l2 2  .673 .715 .759 .811
MSD multvae 256 l2 4  .717 .753 .772 .807
MSD multvae 256 l2 8  .731 .777 .790 .797
MSD multvae 512 cosine 2  .318 .204 .195 .184
MSD multvae 512 cosine 4  .310 .204 .195 .188
MSD multvae 512 cosine 8  .299 .206 .197 .188
MSD multvae 512 l2 2  .649 .690 .709 .737
MSD multvae 512 l2 4  .655 .733 .751 .760
MSD multvae 512 l2 8  .664 .745 .772 .778
MSD multvae 1024 cosine 2  .335 .250 .208 .195
MSD multvae 1024 cosine 4  .331 .246 .210 .197
MSD multvae 1024 cosine 8  .340 .247 .210 .200
MSD multvae 1024 l2 2  .657 .726 .740 .742
MSD multvae 1024 l2 4  .648 .739 .772 .776
MSD multvae 1024 l2 8  .646 .740 .780 .790
"""


def published(model: str) -> list[Published]:
    """The paper's lines for "elsa" or "multvae"; none for any other model."""
    found = []
    for line in _LINES.split("\n"):
        words = line.split()
        if words and words[1] == model:
            kept = tuple(float(word) for word in words[5:])
            found.append(Published(words[0], words[1], int(words[2]), words[3], int(words[4]), kept))
    return found
