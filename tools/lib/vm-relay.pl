#!/usr/bin/perl
# vm-relay.pl FIFO MARK: copies FIFO to standard output as it comes, up to MARK
# (not copied) or to the end of file. A virtio-serial port has no end of stream,
# and "the guest has written it" does not mean "QEMU has passed it on": only the
# mark behind the last byte says that nothing is missing.
use strict;
use warnings;

my ($fifo, $mark) = @ARGV;
open my $in, '<:raw', $fifo or exit 1;
# A reader that went away must not stall the guest: swallow the rest.
$SIG{PIPE} = 'IGNORE';

sub put {
    my ($data, $done) = (shift, 0);
    while ($done < length $data) {
        my $n = syswrite STDOUT, $data, length($data) - $done, $done;
        if (defined $n) { $done += $n; next }
        next if $!{EINTR};
        if ($!{EAGAIN}) { select undef, undef, undef, 0.01; next }
        return;
    }
}

my $held = '';
while (1) {
    my $n = sysread $in, $held, 65536, length $held;
    next if !defined $n && $!{EINTR};
    last if !$n;
    my $at = index $held, $mark;
    if ($at >= 0) { put(substr $held, 0, $at); exit 0 }
    # Hold back only what could be the beginning of the mark.
    my $keep = length($held) < length($mark) ? length $held : length($mark) - 1;
    $keep-- while $keep && substr($held, -$keep) ne substr($mark, 0, $keep);
    put(substr $held, 0, length($held) - $keep, '');
}
put($held);
