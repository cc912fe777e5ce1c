//! What the flag words of both formats have in common.
//!
//! They are two types all the same: a bit of the one means nothing in the other. Which bits there
//! are, and whether unknown ones are kept, is for each format's `header` to say.

/// Defines a flag word: a number whose bits have names.
macro_rules! flag_word {
    ($(#[$told:meta])* $name:ident: $word:ty) => {
        $(#[$told])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name($word);

        impl $name {
            /// The flag word as it is kept.
            #[must_use]
            pub const fn bits(self) -> $word {
                self.0
            }

            /// These flags and `other`.
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// Whether all flags of `other` are set.
            #[must_use]
            pub const fn has(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

pub(super) use flag_word;
